"""What ``model.init_from`` names: a run, a checkpoint, a pipeline, a network's directory, or one of these on the hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.models.modeling_utils import ModelMixin
from jsonargparse import Namespace
from jsonargparse.typing import class_from_function
from torch import Tensor

from ldm.data.latent_schema import common_info
from ldm.data.manifest import LATENT_SHARDS
from ldm.data.sources import open_source
from ldm.errors import LdmError, UsageError
from ldm.files import LOCK_NAME, read_json, require_version
from ldm.models.autoencoder import Autoencoder, LatentNormalizer, autoencoder_hash, load_autoencoder
from ldm.models.directories import downloaded, loading, read_config, require_regular_files, variant_of
from ldm.models.dit import DiT
from ldm.pipeline import FORMAT_VERSION, LatentDiffusionPipeline, ModelIndex
from ldm.runs.checkpoints.files import ANOTHER, read_checkpoint, require_whole
from ldm.runs.checkpoints.sharded import read_sharded
from ldm.runs.config import TRUSTED
from ldm.runs.layout import RunFolder
from ldm.runs.lineage import LINEAGE_NAME
from ldm.training.encoders import Statistics
from ldm.training.initial import InitialWeights

WEIGHTS = "diffusion_pytorch_model"
# networks that a config.json may name; PixArt's were published under the older name
NETWORKS: dict[str, type[ModelMixin]] = {
    "DiT": DiT,
    "PixArtTransformer2DModel": diffusers.PixArtTransformer2DModel,
    "Transformer2DModel": diffusers.PixArtTransformer2DModel,
}


def network_class(config: Mapping[str, Any], place: object, like: ModelMixin | None = None) -> type[ModelMixin]:
    """The class that a network's config names. Raises :class:`UsageError` unless it is known, or that of ``like``."""
    name = config.get("_class_name")
    if like is not None and type(like).__name__ == name:
        return type(like)
    if name not in NETWORKS:
        known = ", ".join(sorted({known.__name__ for known in NETWORKS.values()}))
        raise UsageError(f"{place} holds a network of class {name}; give one of {known}, or model.denoiser of that class")
    return NETWORKS[name]


def network_of(config: dict[str, Any]) -> ModelMixin:
    """A new network of diffusers' ``config.json``."""
    return network_class(config, "the config").from_config(config)  # pyright: ignore[reportAttributeAccessIssue]


#: ``class_path`` of a denoiser whose config is from elsewhere; published ones hold values that their classes do not declare
FromConfig = class_from_function(network_of, ModelMixin, "FromConfig")


def as_options(spec: Mapping[str, Any]) -> Namespace:
    """A class of a run's config, as the parser has it."""
    return Namespace(class_path=spec["class_path"], init_args=Namespace(**spec.get("init_args", {})))


class RunWeights:
    """The weights of a denoiser's run."""

    def __init__(self, run: Path, checkpoint: Path):
        """Raises :class:`UsageError` for a run of another network."""
        self.checkpoint, self.config = checkpoint, RunFolder(run).read_config()
        if "denoiser" not in self.config["model"]:
            raise UsageError(f"{run} is no run of a denoiser; give one of ldm denoiser fit")
        if "token" in self.config["model"]:
            raise UsageError(f"{run} trained a token's embedding, not a denoiser; give the model that it was trained for")
        if self.config["model"].get("adapter"):
            raise UsageError(
                f"{run} trained an adapter, and its checkpoints hold that alone; give the model that it was trained on"
            )

    def denoiser(self) -> Namespace:
        """Class and config of the network, as a config of ``fit`` has them."""
        spec = self.config["model"]["denoiser"]
        if spec["class_path"].partition(".")[0] not in TRUSTED:
            raise UsageError(
                f"{self.checkpoint} is of the class {spec['class_path']}; give it as model.denoiser if you trust it"
            )
        return as_options(spec)

    def read(self, network: ModelMixin, which: str) -> InitialWeights:
        """The averaged weights, or those in training, by the names of ``network``'s. Raises :class:`LdmError` for a broken
        checkpoint."""
        require_whole(self.checkpoint)
        with loading(f"{self.checkpoint} is not a whole checkpoint of its run", ANOTHER):
            sharded = self.checkpoint.is_dir()
            content = read_sharded(self.checkpoint) if sharded else read_checkpoint(self.checkpoint, mmap=True)
            settings = self.config["model"]["denoiser"].get("init_args", {})
            config = {**settings.get("config", settings), **content.get("network", {})}
            weights = self._weights(content, network, which)
            return InitialWeights(str(self.checkpoint), config, weights, *self._latents(content), content.get("diffusion"))

    def _weights(self, content: Mapping[str, Any], network: ModelMixin, which: str) -> dict[str, Tensor]:
        start = "denoiser."
        weights = {name.removeprefix(start): each for name, each in content["state_dict"].items() if name.startswith(start)}
        names = [name for name, _ in network.named_parameters()]
        if which != "average" or {*names} != {*weights}:  # of another network, which is refused with the names that differ
            return weights
        selected = (self.config["model"].get("power_averages") or {}).get("selected")
        average = content["average"] if selected is None else content["average"]["power_function"][repr(selected)]
        averaged = dict(zip(names, average["shadow_params"], strict=True))  # in the order of the network's
        if any(averaged[name].shape != weight.shape for name, weight in weights.items()):
            raise UsageError(f"{self.checkpoint} has averages of another network than its weights; {ANOTHER}")
        return averaged

    def _latents(self, content: dict[str, Any]) -> tuple[Statistics, Mapping[str, Any]]:
        """The statistics and fingerprints of a checkpoint; an older ldm left them to the latents' manifest."""
        if "latent_statistics" in content:
            mean, std = content["latent_statistics"]
            return (mean, std), content.get("trained_on", {})
        train = self.config.get("data", {}).get("train", "")
        try:
            places = [train] if isinstance(train, str) else [each["path"] for each in train]
            info = common_info([open_source(place, LATENT_SHARDS) for place in places])
        except LdmError as error:
            raise UsageError(
                f"{self.checkpoint} does not say how its latents were normalised, and their shards are not there ({error}); "
                "give the pipeline that the run exported"
            ) from None
        return (info.latents_mean, info.latents_std), {"autoencoder": info.autoencoder}


def statistics_of(autoencoder: Autoencoder) -> Statistics | None:
    """What an autoencoder's config normalises latents by; None where it was not given any."""
    mean, std = (autoencoder.config.get(f"latents_{name}") for name in ("mean", "std"))
    if mean is not None and std is not None:
        return mean, std
    scaled = LatentNormalizer.of(autoencoder)  # by a shift and a factor
    return (scaled.mean.tolist(), scaled.std.tolist()) if scaled.mean.any() or (scaled.std != 1).any() else None


class DirectoryWeights:
    """The weights in a network's directory, which may be a pipeline's ``transformer``."""

    def __init__(self, name: str, autoencoder: str | None = None):
        """
        Args:
            name: the directory, or a name on the hub.
            autoencoder: whose statistics normalise the latents where the directory has no ``vae``; for :meth:`read`.

        Raises:
            LdmError: for no directory of a network, or a pipeline of a newer format.
        """
        self.name, self.autoencoder, place = name, autoencoder, downloaded(name, "transformer", "vae")
        # of a pipeline's part, the pipeline, which says what its latents were
        part = place.name == "transformer" and (place.parent / "model_index.json").is_file()
        self.place = place.parent if part else place
        folders = [folder for folder in (self.place, self.place / "transformer") if (folder / "config.json").is_file()]
        if not folders:
            raise UsageError(
                f"{name} holds no weights to start from; give a run, a checkpoint of one, a pipeline or a network's directory"
            )
        self.folder = folders[0]
        self.config = read_config(self.folder / "config.json")
        index = self.place / "model_index.json"
        self.index = read_json(index, ModelIndex) if index.is_file() else ModelIndex()
        if self.index.get("_class_name") == LatentDiffusionPipeline.__name__:
            require_version(self.index.get("format_version"), FORMAT_VERSION, f"{index}: the pipeline")

    def denoiser(self) -> Namespace:
        """Class and config of the network, as a config of ``fit`` has them."""
        network_class(self.config, self.folder)
        config = {name: value for name, value in self.config.items() if name == "_class_name" or not name.startswith("_")}
        if config.get("out_channels") == 2 * config.get("in_channels", 0):
            config["out_channels"] = config["in_channels"]  # without the learned variance
        return as_options({"class_path": f"{__name__}.{FromConfig.__name__}", "init_args": {"config": config}})

    def network(self, like: ModelMixin | None = None) -> ModelMixin:
        """The network in float32, of a known class or that of ``like``.

        Raises :class:`UsageError` for weights that are missing, or are not of their config.
        """
        require_regular_files(self.folder)
        kind: Any = network_class(self.config, self.folder, like)
        with loading(f"{self.folder} cannot be loaded as a {kind.__name__}", "restore it, or give another one"):
            loaded, info = kind.from_pretrained(
                self.folder,
                local_files_only=True,
                output_loading_info=True,
                disable_mmap=True,
                variant=variant_of(self.folder, WEIGHTS),
            )
        for what in ("missing", "unexpected"):
            if keys := [*info[f"{what}_keys"]]:
                raise UsageError(f"{self.folder}: {len(keys)} weights are {what} ({', '.join(keys[:8])}); restore it")
        return loaded

    def copy_with(self, network: ModelMixin, folder: Path) -> None:
        """Copy the directory to ``folder``, with other weights of the network."""
        part = self.folder.relative_to(self.place)

        def leave_out(place: str, names: list[str]) -> list[str]:
            own = [name for name in names if name.startswith((WEIGHTS, "config.json"))] if Path(place) == self.folder else []
            return [*own, *(name for name in names if name in (LINEAGE_NAME, LOCK_NAME))]

        shutil.copytree(self.place, folder, ignore=leave_out, dirs_exist_ok=True)
        network.save_pretrained(folder / part)

    def read(self, network: ModelMixin, which: str) -> InitialWeights:
        """The weights. Raises :class:`UsageError` for weights that are missing, or are not of their config."""
        if which != "average":
            raise UsageError(f"init_weights {which}: {self.name} is no run and has one kind of weights; leave it out")
        loaded: Any = self.network(network)
        own = self.place / "vae"
        assert self.autoencoder is not None
        normaliser = load_autoencoder(own if own.is_dir() else self.autoencoder)
        trained_on = self.index.get("trained_on") or ({"autoencoder": autoencoder_hash(normaliser)} if own.is_dir() else {})
        weights: dict[str, Tensor] = dict(loaded.named_parameters())
        return InitialWeights(
            self.name, dict(loaded.config), weights, statistics_of(normaliser), trained_on, self.index.get("diffusion")
        )


def initial_weights(name: str, autoencoder: str | None = None) -> RunWeights | DirectoryWeights:
    """What ``name`` names; ``autoencoder``: as of :class:`DirectoryWeights`. Raises :class:`LdmError` for anything else."""
    path = Path(name)
    if path.suffix == ".ckpt":
        return RunWeights(path.absolute().parent.parent, path)
    run = RunFolder(path)
    return RunWeights(path, run.last_checkpoint) if run.config.exists() else DirectoryWeights(name, autoencoder)
