"""``ldm autoencoder fit`` and ``ldm denoiser fit``: check, resume, train, export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import DDPStrategy

from ldm.data.image_folder import open_data
from ldm.data.sources import ShardCache
from ldm.errors import UsageError
from ldm.files import LOCK_NAME, require_new_folder
from ldm.locks import hold_folder
from ldm.machine import bf16_is_faster, device_type, set_fp32_precision
from ldm.runs.agreement import agree_on_time
from ldm.runs.callbacks import AverageSnapshots, ModelFlops, PreviewGrid, ProgressLine
from ldm.runs.checkpoints.files import (
    candidates,
    checkpoint_summary,
    latest_checkpoint,
    load_checkpoint,
    read_checkpoint,
    require_run,
)
from ldm.runs.config import require_values
from ldm.runs.export import export_run, require_finite, write_artifact
from ldm.runs.faults import explained
from ldm.runs.initial import as_options, initial_weights
from ldm.runs.layout import is_checkpoint, step_of
from ldm.runs.lightning_private import is_rank_zero, set_ddp_options
from ldm.runs.lineage import DataRecord, initial_record, weights_hash
from ldm.runs.logging import amend_start, loggers, recorded
from ldm.runs.preemption import Preemption, ended_by_sigterm
from ldm.runs.torchrun import run_under_torchrun
from ldm.runs.training_cli import TrainingCLI
from ldm.terminal import say
from ldm.training.base import TrainingModule
from ldm.training.denoiser import DenoiserTraining
from ldm.training.fsdp import is_sharded
from ldm.training.textual_inversion import TextualInversion

LATEST = "latest"


class FitCLI(TrainingCLI):
    """Trains in the folder ``--out``, from nothing or from a checkpoint, and exports the model at the end."""

    def __init__(self, module_class: type[TrainingModule], arguments: Sequence[str], callbacks: Sequence[Callback] = ()):
        """``callbacks``: beside those of the config."""
        self.callbacks = callbacks
        with ExitStack() as self.held:  # the lock of the run's folder, up to the end of the export
            super().__init__(module_class, arguments)

    @property
    def artifact(self) -> Path:
        """The folder of the exported model."""
        name = "adapter" if self.options.model.get("adapter") else self.module_class.artifact
        return Path(self.options.export or Path(self.options.out) / name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        require_values(self.options)
        self.any_seed = isinstance(self.options.seed_everything, bool)  # Lightning replaces it by a random one

    def before_instantiate_classes(self) -> None:
        run_under_torchrun([self.module_class.command, *self.arguments], self.options.trainer)
        if is_rank_zero():
            self.held.enter_context(hold_folder(self.options.out, f"training in {self.options.out}"))
        self._find_checkpoint()
        self._check_folders()
        self._check_data()
        self._find_initial_weights()
        self._check_trainer()
        set_fp32_precision(self.options.matmul_precision or "highest")

    def _find_checkpoint(self) -> None:
        """Set ``checkpoint``, what ``--resume`` or ``--ckpt_path`` resumes from, and ``resumed_at``, its step; None for none.

        The first process alone chooses and verifies; the others take its choice when the checkpoint is loaded.
        """
        options, folder = self.options, self.folder.checkpoints_folder
        self.checkpoint = Path(options.ckpt_path) if options.ckpt_path else None
        self.resumed_at: int | None = None
        if options.resume and self.checkpoint:
            raise UsageError("--resume and --ckpt_path both say what to resume from; give one")
        if options.resume and options.resume != LATEST:
            self.checkpoint = Path(options.resume)
            if not os.path.exists(self.checkpoint):
                raise UsageError(f"--resume {self.checkpoint} does not exist; give latest, or one of {folder}")
        elif options.resume and (found := candidates(folder)):
            self.checkpoint = found[-1]
        elif options.resume and is_rank_zero():
            say(f"{options.out}: no checkpoint to resume from yet; the run starts anew")
        if not self.checkpoint:
            return
        if options.resume:
            self._exit_if_finished(self.checkpoint)
        if is_rank_zero():
            if options.resume == LATEST:
                self.checkpoint = latest_checkpoint(folder)
            content = load_checkpoint(self.checkpoint, mmap=True)  # for a few values
            require_run(content, self.checkpoint)
            self.resumed_at = content["global_step"]
            self._require_same_optimiser(content)
            self._require_same_seeds(content)
            say(f"resuming from {self.checkpoint}: {checkpoint_summary(content)}")

    def _exit_if_finished(self, checkpoint: Path) -> None:
        """Exit with 0 where nothing is left to train: a job that SLURM requeues must end once."""
        name = checkpoint.resolve()  # of last.ckpt
        step = step_of(name) if is_checkpoint(name) else read_checkpoint(checkpoint, mmap=True)["global_step"]
        steps = self.options.trainer.max_steps
        if (steps < 0 or step >= steps) and self.artifact.is_dir():
            say(f"{self.options.out} is finished: {self.artifact}")
            raise SystemExit(0)

    def _require_same_optimiser(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the moments of another optimiser; torch's own error would only count them."""
        model, states = self.options.model, checkpoint.get("optimizer_states", [])  # which a sharded one has elsewhere
        muon = model.optimiser.muon_learning_rate is not None
        rates = checkpoint["lr_schedulers"][0]["base_lrs"]  # the second is Muon's, or of an adapter's B
        ratio = (model.get("adapter") or {}).get("loraplus_lr_ratio") or 1  # with 1 all have one rate
        groups = states[0]["param_groups"] if states else []
        had_muon = any(group.get("muon") for group in groups) if states else len(rates) > 1 and ratio == 1
        if had_muon != muon:
            how, fix = ("without", "null") if muon else ("with", f"{rates[-1]:g}")
            raise UsageError(
                f"{self.checkpoint} was trained {how} Muon: give --model.optimiser.muon_learning_rate {fix} to resume from it"
            )
        if not muon and (len(rates) > 1) != (ratio != 1):
            before = f"{rates[1] / rates[0]:g}" if len(rates) > 1 else "null"
            raise UsageError(
                f"{self.checkpoint} was trained with another loraplus_lr_ratio: give --model.adapter.loraplus_lr_ratio "
                f"{before} to resume from it"
            )
        for number, name in enumerate(name for name in ("optimiser", "discriminator_optimiser") if name in model):
            asked = model[name].eight_bit
            groups = states[number]["param_groups"] if number < len(states) else []
            if any(group.get("eight_bit", False) for group in groups) != asked:
                how = "without" if asked else "with"
                raise UsageError(
                    f"{self.checkpoint} was trained {how} moments in 8 bits: give --model.{name}.eight_bit "
                    f"{str(not asked).lower()} to resume from it"
                )

    def _require_same_seeds(self, checkpoint: dict[str, Any]) -> None:
        """Refuse other seeds: noise and order of a resumed run are those that it began with."""
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        seeds = [("seed_everything", checkpoint["seed"]), *(("data.seed", state["seed"]) for state in loaders)]
        for key, first in seeds:
            if key == "seed_everything" and self.any_seed:
                self.options[key] = first  # for the record
            elif first is not None and self.options[key] != first:
                raise UsageError(
                    f"{key} is {self.options[key]}, but the run began with {first} and keeps it; give {key} {first}"
                )

    def _check_folders(self) -> None:
        out, resume = Path(self.options.out), self.options.resume
        self.made_folder = not out.exists() or all(path.name == LOCK_NAME for path in out.iterdir())
        if not is_rank_zero():  # by the time that another process looks, the first has written there
            return
        require_new_folder(self.artifact, "the exported model")
        if self.checkpoint is None and not (resume and self.folder.logs.is_dir()):
            require_new_folder(out, "the run", in_place=True)
        elif self.checkpoint is not None and not self.folder.checkpoints_folder.is_dir():
            raise UsageError(f"{out} is not the folder of a run; give as --out the run that the checkpoint is of")

    def _check_data(self) -> None:
        data, prior = self.options.data, self.options.data.regularisation
        cache = ShardCache(Path(data.cache)) if data.cache else None
        train = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
        places = [("train", path, data.default_caption) for path in train]
        places.append(("validation", data.validation, data.default_caption))
        if prior is not None:
            path, caption = (prior, None) if isinstance(prior, str) else (prior.path, prior.caption)
            places.append(("regularisation", path, caption))
        for split, path, caption in places:
            try:
                open_data(path, caption, cache, self.module_class.reads_captions)
            except UsageError as error:
                raise UsageError(f"data.{split}: {error}") from None

    def _find_initial_weights(self) -> None:
        """Set ``initial``, what ``model.init_from`` names, unless the run resumes from a checkpoint that holds all weights;
        fill in the denoiser where it is left out."""
        model, self.initial = self.options.model, None
        beside = self.module_class is TextualInversion or bool(model.get("adapter"))  # a checkpoint is of what is beside it
        if model.get("init_from") and (self.checkpoint is None or beside):
            self.initial = initial_weights(model.init_from, model.autoencoder)
        if "denoiser" in model and model.denoiser is None:
            if self.initial is not None:
                model.denoiser = self.initial.denoiser()
            elif self.checkpoint is not None:
                model.denoiser = as_options(self.folder.read_config()["model"]["denoiser"])
            else:
                raise UsageError("model.denoiser is missing; give its class and config, or model.init_from to have another's")

    def _start_from_initial_weights(self) -> None:
        if self.initial is None:
            return
        assert isinstance(self.model, DenoiserTraining)
        initial = self.initial.read(self.model.denoiser, self.model.init_weights)
        report = self.model.start_from(initial)
        require_finite(self.model.denoiser, initial.source)
        if is_rank_zero() and self.checkpoint is None:
            amend_start(Path(self.options.out), initial=initial_record(str(self.model.init_from)))
            say(report)

    def _check_trainer(self) -> None:
        """Fill in the trainer's defaults."""
        trainer = self.options.trainer
        device = device_type(str(trainer.accelerator))
        if str(trainer.precision) in ("16", "16-mixed", "16-true") and device == "cpu":
            # Lightning would train in bf16 with no more than a warning
            raise UsageError(f"trainer.precision {trainer.precision}: a CPU has no fp16; give bf16-mixed or 32-true")
        if trainer.precision is None:
            trainer.precision = "bf16-mixed" if bf16_is_faster(device) else "32-true"
        if trainer.strategy in ("fsdp", "fsdp2"):
            trainer.strategy = Namespace(class_path="ldm.runs.strategies.FullySharded", init_args=Namespace())
        trainer.default_root_dir = self.options.out

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # not as ckpt_path in the saved config: a run from that config must not ask for an old checkpoint
        return super()._prepare_subcommand_kwargs(subcommand) | {"ckpt_path": self.checkpoint}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.config.subcommand].trainer
        model_flops = ModelFlops()
        trainer = super().instantiate_trainer(
            logger=loggers(Path(self.options.out), settings.logger, self.resumed_at),
            callbacks=[
                *(given if isinstance(given := settings.callbacks or [], list) else [given]),
                *self.callbacks,
                Preemption(),
                model_flops,
                ProgressLine(self.options.title or self.artifact.name, model_flops),
                PreviewGrid(),
                AverageSnapshots(),
                DataRecord(),
            ],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data plan splits samples over the processes
        )
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, Timer):
                agree_on_time(callback)
        if isinstance(trainer.strategy, DDPStrategy):
            set_ddp_options(
                trainer.strategy,
                find_unused_parameters=False,
                forward_sync_buffers=False,  # every process computes the same ones
                gradient_as_bucket_view=True,  # neither the memory of a second set of gradients nor the time to copy it
            )
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """A run that ends before its first step removes its new folder, so that the same command works afterwards."""
        command = ["ldm", self.module_class.command, *self.arguments]
        try:
            with recorded(self.trainer, self.model, command, self.resumed_at), explained(self.trainer), ended_by_sigterm():
                self._start_from_initial_weights()
                super()._run_subcommand(subcommand)
        except BaseException:
            if self.made_folder and self.trainer.is_global_zero and self.trainer.global_step == 0:
                shutil.rmtree(self.options.out, ignore_errors=True)
            raise

    def after_fit(self) -> None:
        """Export the model with the averaged weights."""
        if self.trainer.global_step == 0:
            raise UsageError("the run ended before its first step; raise trainer.max_time")
        if not self.trainer.is_global_zero:
            return
        if is_sharded(self.model.averaged()):
            export_run(self.module_class, Path(self.options.out), self.artifact, trust=True)  # as it was trained
        else:
            device, step = self.trainer.strategy.root_device, self.trainer.global_step
            write_artifact(self.model, self.artifact, device, self.folder, step)
        exported = {"step": self.trainer.global_step, "weights": weights_hash(self.artifact)}
        amend_start(self.folder.path, exported=exported)
