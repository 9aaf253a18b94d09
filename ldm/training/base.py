"""What all trainings share: the parts of a step, the average of the weights, the checkpoint, the exported artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ldm.data.datamodule import ShardDataModule, datamodule_of
from ldm.data.loader import BatchNoise, nothing
from ldm.errors import UsageError
from ldm.training.ema import Average, PowerAverages
from ldm.training.fsdp import is_sharded, shard
from ldm.training.nonfinite import SkippedSteps
from ldm.training.randomness import global_states, set_global_state
from ldm.training.step import Readback, Report, Request, Update, mean_over_processes, to_device

# how many differing weights an error lists
LISTED_WEIGHTS = 8

T = TypeVar("T")


# entries of a network's config that a resumed run may change: its weights mean the same
FREE = frozenset({"sample_size", "dropout", "latents_mean", "latents_std", "scaling_factor", "shift_factor", "force_upcast"})


def require_weights(
    network: nn.Module, shapes: Mapping[str, Sequence[int]], what: str, is_absent: Callable[[str], bool] = lambda name: False
) -> None:
    """Raise :class:`UsageError`, listing the keys, unless ``what`` holds weights of the network's names and shapes.

    Names of which ``is_absent`` is true need not be there.
    """
    found = {name: tuple(shape) for name, shape in shapes.items()}
    own = ((name, weight) for name, weight in network.state_dict().items() if not is_absent(name))
    expected = {name: tuple(weight.shape) for name, weight in own}
    parameters = [name for name, _ in network.named_parameters() if name in expected]  # buffers need not be there
    differing = [
        f"{name}: {found.get(name, 'none')} there, {expected.get(name, 'none')} here"
        for name in dict.fromkeys([*parameters, *found])
        if found.get(name) != expected.get(name)
    ]
    _require_none(differing, f"{len(differing)} weights", what)


def require_settings(own: Mapping[str, Any], saved: Mapping[str, Any], what: str) -> None:
    """Raise :class:`UsageError`, listing them, for settings of a network that ``what`` has saved with other values."""
    differing = [
        f"{name}: {saved[name]} there, {value} here"
        for name, value in own.items()
        if name in saved and _plain(saved[name]) != _plain(value)
    ]
    _require_none(differing, "settings", what)


def _require_none(differing: Sequence[str], differ: str, what: str) -> None:
    if differing:
        listed = "; ".join(differing[:LISTED_WEIGHTS])
        more = f"; and {len(differing) - LISTED_WEIGHTS} more" if len(differing) > LISTED_WEIGHTS else ""
        raise UsageError(
            f"{what} is of another network than the config's, {differ} differ ({listed}{more}); give the config that it was "
            "trained with"
        )


class TrainingModule(LightningModule):
    """What all training modules share: steps over micro-batches, the average of one network, its export.

    Optimisation is manual, so that one batch of the loader is one step of the optimiser, however many micro-batches it
    is split into.
    """

    #: the command whose ``fit`` trains it, and the name of the directory that it exports
    command, artifact = "stage", "model"
    #: whether it is trained on captions; where not, the data need none and their captions are not read
    reads_captions = True
    #: whether the loss of each sample counts by the ``loss_weight`` of a batch
    weighs_samples = False
    #: micro-batches that a batch is split into
    accumulate: int
    #: losses whose parameters, if any, are trained with those of :meth:`averaged`
    losses: Sequence[nn.Module]
    skips: SkippedSteps
    #: of the noise of every step (:mod:`ldm.training.randomness`); a resumed run keeps its first one
    seed: int | None = None
    _random_states: list[dict[str, Any]] | None = None
    #: of the last step, until it is read
    _report: Report | None = None
    #: called by a long validation between its parts, on all processes; it may raise to end the run
    pause: Callable[[], None] = staticmethod(nothing)

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._logged: dict[str, Tensor] = {}  # of the last step that was read, on the CPU
        self._asks: set[Request] = set()  # of this process, not sent yet
        self._asked: set[Request] = set()  # of any process, not answered yet

    # -- the parts of a step -------------------------------------------------------------------------------------------

    def optimiser_and_schedule(self, number: int = 0, counted: bool = True) -> tuple[Optimizer, LRScheduler]:
        """Those at position ``number`` of :meth:`configure_optimizers`; ``counted``: a step raises ``global_step``."""
        optimisers, schedules = self.optimizers(use_pl_optimizer=counted), self.lr_schedulers()
        return (
            cast(Optimizer, optimisers[number] if isinstance(optimisers, list) else optimisers),
            cast(LRScheduler, schedules[number] if isinstance(schedules, list) else schedules),
        )

    def micro_batches(self, parts: Sequence[T], sizes: Sequence[int]) -> Iterator[tuple[T, float]]:
        """Each micro-batch with its fraction of the samples. Processes exchange gradients at the last one only."""
        strategy = self.trainer.strategy
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True), 1):
            exchange: AbstractContextManager[Any] = nullcontext()
            if number < len(parts) and isinstance(strategy, ParallelStrategy):
                exchange = strategy.block_backward_sync()
            with exchange:
                yield part, size / sum(sizes)

    def finish_step(
        self,
        metrics: Mapping[str, Tensor],
        updates: Sequence[Update],
        draws: np.ndarray,
        shared: Sequence[Tensor] = (),
        **numbers: float,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The end of a training step: the processes exchange one vector, then each optimiser updates its network.

        An update is void if its loss or gradients are not finite on any process, or if the one before it is void: the step
        counts, but no weight changes. The host learns what became of the step in the next one (:meth:`settle`); at every
        ``log_every_n_steps``-th, whose metrics are logged, it waits for it.

        Args:
            metrics: scalars of this process, logged as means over all.
            updates: the first one is that of :meth:`averaged`, whose gradient norm and learning rate are logged.
            draws: of the batch, (B, 2).
            shared: scalars that are replaced by their means over all processes.
            numbers: of the host, the same on all processes, to be logged too.

        Returns:
            The means of the metrics, and (updates,) 1 for each update that is void, else 0; on the device.
        """
        step, every = self.global_step, self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        values = [*metrics.values(), *(update.summand() for update in updates), *shared]
        vector = torch.stack([value.detach().float().to(self.device) for value in values])
        asks = [request in self._asks for request in Request] if self.trainer.world_size > 1 else []
        if asks:
            vector = mean_over_processes(torch.cat([vector, to_device(asks, self.device)]))
            self._asks.clear()
        means, summands, new_shared, asked = vector.split([len(metrics), len(updates), len(shared), len(asks)])
        mean_of = dict(zip(metrics, means, strict=True))
        norms = [update.norm(summand) for update, summand in zip(updates, summands, strict=True)]
        checked = torch.stack([summand + mean_of[update.loss] for update, summand in zip(updates, summands, strict=True)])
        voids = (~checked.cumsum(0).isfinite()).float()
        for scalar, mean in zip(shared, new_shared, strict=True):
            scalar.copy_(mean)

        self.settle()  # the step before: up to here the weights are those that it left
        numbers["train/lr"] = float(updates[0].schedule.get_last_lr()[0])
        networks = [update.network for update in updates]
        values = Readback(torch.cat([means, norms[0][None], voids, asked]))
        self._report = Report(step, draws, [*metrics, "train/grad_norm"], networks, numbers, values)
        for update, norm, void in zip(updates, norms, voids, strict=True):
            update.apply(norm, void)
        if every and (step + 1) % every == 0:
            self._log_step()
        return mean_of, voids

    def settle(self) -> None:
        """Let the host learn what became of the last step: update the averages, or record that the step was skipped.

        The device has mostly finished that step, where this is called in the next one. Elsewhere it is waited for: where the
        averages are used or saved, and at the end of training.
        """
        if self._report is None:
            return
        report, self._report = self._report, None
        logged, voids, asked = report.read()
        self._logged = logged
        self._asked |= asked
        for number, (network, void) in enumerate(zip(report.networks, voids, strict=True)):
            if void:  # and so are those after it
                self.skips.count_skipped(network, self.trainer, report.step, report.draws)
                break
            self.skips.count_taken(network)
            if number == 0:
                self.average.update()
        if self.skips.total:
            self._logged["train/skipped"] = torch.tensor(float(self.skips.total))

    def _log_step(self) -> None:
        self.settle()
        self.log_dict(self._logged)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.should_stop:  # Lightning logs the last step, whatever its number
            self._log_step()

    def on_train_epoch_end(self) -> None:
        self.settle()  # before callbacks and the export use the averages

    # -- what one process asks of all ----------------------------------------------------------------------------------

    def ask(self, request: Request) -> None:
        """Ask all processes; each of them learns it from the next step's vector, and a single process at once."""
        (self._asks if self.trainer.world_size > 1 else self._asked).add(request)

    def asked(self, request: Request) -> bool:
        """Whether a process has asked for it since this was last called; the same on all processes."""
        found = request in self._asked
        self._asked.discard(request)
        return found

    # -- what a stage defines ------------------------------------------------------------------------------------------

    def prepare(self, data: ShardDataModule) -> None:
        """Load what the data need, and refuse data that do not fit. Called before training and before an export."""
        raise NotImplementedError

    def batch_noise(self) -> BatchNoise | None:
        """What draws the noise of training batches, in the loader's workers; asked for once :attr:`seed` is known. None: the
        batches need none."""
        raise NotImplementedError

    @property
    def token_side(self) -> int:
        """The side of a token (a patch of the denoiser, a position of the latents) in what the data hold: latents or pixels."""
        raise NotImplementedError

    def averaged(self) -> nn.Module:
        """The network whose average is kept."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """Parts of :meth:`averaged`, inner ones first, that FSDP gathers one by one."""
        raise NotImplementedError

    def preview(self) -> list[tuple[str, list[Image.Image]]]:
        """Rows of images with their labels, from fixed samples and seeds."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the artifact into the empty ``folder``; called while the average is applied."""
        raise NotImplementedError

    # -- setup ---------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        data, precision = datamodule_of(self.trainer), str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise UsageError(
                f"precision {precision}: small updates are lost unless weights are fp32, and fp16 overflows; give bf16-mixed "
                "or 32-true"
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and (losses := self._losses_with_parameters()):
            name = type(losses[0]).__name__
            raise UsageError(f"{name} has parameters, which fsdp does not shard; remove this loss, or train with ddp")
        if self.accumulate < 1:
            raise UsageError(f"accumulate is {self.accumulate}; give 1 or more")
        self.prepare(data)
        if self.accumulate > (least := min(data.batch_sizes(data.train_set))):
            raise UsageError(f"accumulate {self.accumulate} is more than batch_size {least}; lower it")

    def _losses_with_parameters(self) -> list[nn.Module]:
        return [loss for loss in self.losses if any(True for _ in loss.parameters())]

    def trained(self) -> nn.Module:
        """The averaged network, and the losses that have parameters."""
        losses = self._losses_with_parameters()
        return nn.ModuleList([self.averaged(), *losses]) if losses else self.averaged()

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products; weights are fp32."""
        return torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32

    def configure_model(self) -> None:
        """Under FSDP, shard the trained network and its averages over the processes."""
        network = self.averaged()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not is_sharded(network):
            assert self.device_mesh is not None
            shard(network, self.blocks(), self.device_mesh["data_parallel"], self.compute_dtype)
            self.start_average(*self._averaging)

    def start_average(self, decay: float, power: PowerAverages | None = None, offload: bool = False) -> None:
        """Begin the averages of :meth:`averaged`: an exponential one and those of ``power``; ``offload``: on the host."""
        self._averaging = decay, power, offload
        self.average = Average(self.averaged(), decay, power, offload)

    @contextmanager
    def average_applied(self) -> Iterator[None]:
        """Within this context the network is in evaluation mode with averaged weights: validation, previews, export."""
        self.settle()
        network = self.averaged()
        was_training = network.training
        network.eval()
        try:
            with self.average.applied(), torch.no_grad():
                yield
        finally:
            network.train(was_training)

    def on_fit_start(self) -> None:
        self.average.to(self.device)
        if self.seed is None:
            self.seed = torch.initial_seed()
        # every process got the same seed, so that initial weights are the same; from here on dropout must differ
        if self.trainer.world_size > 1:
            torch.manual_seed(self.seed + self.global_rank)

    def on_train_start(self) -> None:
        """Let a resumed run have the settings that are asked for; restored optimisers and schedules have those of the old run.

        The schedule continues at its step, from the new base rate.
        """
        for number, settings in enumerate(self._optimiser_settings):
            optimiser, schedule = self.optimiser_and_schedule(number, counted=False)
            for group, asked in zip(optimiser.param_groups, settings, strict=True):
                group.update(asked)
            assert isinstance(schedule, LambdaLR)
            schedule.base_lrs = [group["initial_lr"] for group in optimiser.param_groups]
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(optimiser.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate

    def keep_settings(self, optimisers: Sequence[Optimizer]) -> None:
        """Note the settings that these optimisers were built with; called by :meth:`configure_optimizers`."""
        self._optimiser_settings = [
            [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in optimiser.param_groups]
            for optimiser in optimisers
        ]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # not earlier: starting the loaders and their processes uses random numbers too
        if self._random_states is not None:
            if len(self._random_states) == self.trainer.world_size:
                set_global_state(self._random_states[self.global_rank])
            self._random_states = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle()
        checkpoint["average"] = self.average.state_dict()
        checkpoint["skipped"] = self.skips.state_dict()
        checkpoint["seed"], checkpoint["random"] = self.seed, global_states()
        checkpoint["network"] = self._network_config()
        # Lightning saves at the end of a validation, while the average is applied; a checkpoint needs the trained weights
        trained = self.average.trained()
        if trained is not None:
            network = self.averaged()
            prefix = next(name for name, module in self.named_modules() if module is network)
            names = [f"{prefix}.{name}" for name in self.average.names]
            checkpoint["state_dict"] |= dict(zip(names, trained, strict=True))
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if not self.is_absent(k)}

    def _network_config(self) -> dict[str, Any]:
        """What the weights of :meth:`averaged` mean, in plain values."""
        config = getattr(self.averaged(), "config", {})
        return {name: value for name, value in config.items() if not name.startswith("_") and name not in FREE}

    def is_absent(self, name: str) -> bool:
        """Whether a weight is built or loaded anew for every start, and not kept in checkpoints."""
        return False

    def require_same_network(self, checkpoint: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise :class:`UsageError`, listing the keys, unless a checkpoint with weights of these shapes fits the module."""
        require_weights(self, shapes, "the checkpoint", self.is_absent)
        require_settings(self._network_config(), checkpoint.get("network", {}), "the checkpoint")  # an older ldm saved none
        trained = sum(parameter.requires_grad for parameter in self.trained().parameters())
        for state in checkpoint.get("optimizer_states", [])[:1]:
            count = sum(len(group["params"]) for group in state["param_groups"])
            if count != trained:
                raise UsageError(
                    f"the checkpoint's run trained {count} weights, and this one trains {trained}, because what is frozen "
                    "differs; give the config that it was trained with"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # a sharded one has been checked and loaded by the strategy
            weights = checkpoint["state_dict"]
            self.require_same_network(checkpoint, {name: weight.shape for name, weight in weights.items()})
            checkpoint["state_dict"] = {k: v for k, v in self.state_dict().items() if self.is_absent(k)} | weights
        self.average.load_state_dict(checkpoint["average"])
        self.skips.load_state_dict(checkpoint["skipped"])
        self.seed, self._random_states = checkpoint["seed"], checkpoint["random"]

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._validating = self.average_applied()
        self._validating.__enter__()

    def on_validation_model_train(self) -> None:
        self._validating.__exit__(None, None, None)
        super().on_validation_model_train()


def _plain(value: Any) -> Any:
    """A value that compares with one that went through a file: a list for a tuple."""
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
