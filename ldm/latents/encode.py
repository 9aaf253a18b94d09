"""The two frozen networks of an export: images -> posteriors, captions -> embeddings, the same bytes on every run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from threading import Lock, Semaphore
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from ldm.data.latent_schema import TextInfo, latent_info
from ldm.data.sources import ShardSource
from ldm.errors import UsageError
from ldm.models.autoencoder import autoencoder_hash, load_autoencoder
from ldm.models.text_encoder import TextEncoder, embed, max_tokens

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("ldm", "torch", "diffusers", "transformers", "safetensors")
# captions of one call of a text encoder, and what their lengths are rounded up to
CAPTIONS_AT_A_TIME, TOKENS_STEP = 16, 8
# embeddings kept for captions that come again
KNOWN_BYTES = 2**28
# On a GPU, batches in its hands at a time: one is computed while another comes or goes.
BATCHES_ON_GPU = 2

Dtype = Literal["float16", "float32"]
Precision = Literal["fp32", "bf16", "fp16"]


class Process(NamedTuple):
    """Which of how many processes this is, as torchrun or SLURM say."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def here(cls) -> Process:
        """From the environment; one process where neither started it."""
        for names in (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
            # SLURM gives each task its own cores, so there is nothing to share
            ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ""),
        ):
            if all(name in os.environ for name in names[:3]):
                return cls(*(int(os.environ.get(name, 1)) for name in names))
        return cls(0, 1, 0, 1)

    def device(self) -> torch.device:
        """A GPU of its own where there are any."""
        count = torch.cuda.device_count()
        return torch.device("cuda", self.local_rank % count) if count else torch.device("cpu")

    @property
    def cores(self) -> int:
        """Its share of the CPU cores that may be used here."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(cores // self.local_world_size, 1)


def versions() -> dict[str, str]:
    """Of the libraries that decide about the bytes of latents."""
    return {package: version(package) for package in PACKAGES}


@contextmanager
def single_threaded() -> Iterator[None]:
    """Every operation of torch in the thread that calls it, here and in threads started meanwhile.

    Then the last bit of a result does not depend on the number of cores, and as many batches are computed at a time as
    there are threads, which at these sizes is faster than all cores on one batch.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def computing_in(device: torch.device, precision: Precision) -> torch.autocast | nullcontext:
    """Autocast, which holds for the thread that enters it."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, PRECISIONS[precision])


def require_precision(device: torch.device, precision: Precision) -> None:
    """Raise :class:`UsageError` for what the device does not have."""
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; give fp32, or bf16 where the CPU has it")


def load_matching(path: str | Path, source: ShardSource, device: torch.device | str = "cpu") -> AutoencoderKL:
    """The autoencoder that made the latents. Raises :class:`UsageError` naming both where ``path`` holds another one."""
    info, autoencoder = latent_info(source), load_autoencoder(path)
    if (found := autoencoder_hash(autoencoder)) != info.autoencoder:
        raise UsageError(
            f"{source.spec} holds latents of autoencoder {info.autoencoder[:12]}, but {path} is {found[:12]}; give the one "
            "they were exported with, or export again: ldm latents export"
        )
    return autoencoder.to(device)


class LatentEncoder:
    """Images to posteriors; may be called from several threads."""

    def __init__(self, autoencoder: AutoencoderKL, precision: Precision, dtype: Dtype, mode: bool):
        """
        Args:
            autoencoder: on its device.
            precision: that it computes in.
            dtype: of the results.
            mode: leave the standard deviation out.
        """
        require_precision(autoencoder.device, precision)
        # channels last in memory: on the CPU a fifth to a third faster
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)
        self.precision, self.dtype, self.mode = precision, getattr(torch, dtype), mode
        on_gpu = autoencoder.device.type == "cuda"
        self._turns = Semaphore(BATCHES_ON_GPU) if on_gpu else nullcontext()

    def __call__(self, images: Tensor) -> dict[str, np.ndarray]:
        """Images (B, 3, H, W) in [−1, 1] -> ``mean`` and ``std``, (B, C, h, w)."""
        device = self.autoencoder.device
        with self._turns, torch.inference_mode(), computing_in(device, self.precision), _own_stream(device):
            images = images.to(device, memory_format=torch.channels_last)
            moments = self.autoencoder.encode(images).latent_dist.parameters
            posterior = DiagonalGaussianDistribution(moments.float())
            found = {"mean": posterior.mean} | ({} if self.mode else {"std": posterior.std})
            return {name: values.to(self.dtype).cpu().numpy() for name, values in found.items()}


def _own_stream(device: torch.device) -> torch.cuda.StreamContext | nullcontext:
    """So that one thread's copies run beside another one's computing."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


class Embedded(NamedTuple):
    """A caption's embedding (L, D), and whether it was too long and has been cut."""

    text: np.ndarray
    cut: bool


def in_order_of(captions: Sequence[str], found: Sequence[dict[str, Embedded]]) -> tuple[list[list[np.ndarray]], list[int]]:
    """For each encoder the embeddings of the captions, and how many were cut, from what :meth:`TextEncoders.lookup` gave."""
    texts = [[known[caption].text for caption in captions] for known in found]
    return texts, [sum(known[caption].cut for caption in captions) for known in found]


class TextEncoders:
    """One or several frozen text encoders through which every caption goes; may be called from several threads.

    A caption's embedding is the same to the last bit whatever captions stand beside it: every call of an encoder has a fixed
    number of captions, filled up where there are fewer, and a length that is the caption's own, rounded up. So embeddings can
    be kept for the captions that come again, as they do in most data sets, without any effect on what is written.
    """

    def __init__(self, encoders: Sequence[TextEncoder], dtype: Dtype, precision: Precision):
        require_precision(encoders[0].model.device, precision)
        self.encoders, self.dtype, self.precision = encoders, getattr(torch, dtype), precision
        self._known: list[dict[str, Embedded]] = [{} for _ in encoders]
        self._known_bytes = 0
        self._lock = Lock()

    @classmethod
    def load(cls, names: Sequence[str], device: torch.device | str, dtype: Dtype, precision: Precision) -> TextEncoders:
        """By what :meth:`TextEncoder.load` takes. Raises :class:`UsageError` for none, or one twice."""
        if not names or len(set(names)) != len(names):
            raise UsageError(f"--text-encoder {' '.join(names)}: give one or more, each once")
        return cls([TextEncoder.load(name, device) for name in names], dtype, precision)

    def __call__(self, captions: Sequence[str]) -> tuple[list[list[np.ndarray]], list[int]]:
        """For each encoder the embeddings (L_j, D) of the captions, in their order; and how many it had to cut."""
        return in_order_of(captions, self.lookup(captions))

    def lookup(self, captions: Iterable[str]) -> list[dict[str, Embedded]]:
        """For each encoder what it makes of each caption."""
        wanted = set(captions)
        found = []
        for encoder, known in zip(self.encoders, self._known, strict=True):
            # another thread may be emptying it
            here = {caption: embedded for caption in wanted if (embedded := known.get(caption)) is not None}
            found.append(here | self._encode(encoder, known, sorted(wanted - here.keys())))
        return found

    def _encode(self, encoder: TextEncoder, known: dict[str, Embedded], captions: list[str]) -> dict[str, Embedded]:
        if not captions:
            return {}
        limit = max_tokens(encoder.tokenizer)
        with self._lock:  # a tokenizer is none for several threads
            ids = encoder.tokenizer(captions).input_ids
            cut = [len(tokens) > limit for tokens in ids]
            if any(cut):
                ids = encoder.tokenizer(captions, truncation=True, max_length=limit).input_ids
        by_length: dict[int, list[int]] = {}
        for number, tokens in enumerate(ids):
            by_length.setdefault(min(-(-len(tokens) // TOKENS_STEP) * TOKENS_STEP, limit), []).append(number)
        found = {}
        for length, numbers in by_length.items():
            for start in range(0, len(numbers), CAPTIONS_AT_A_TIME):
                few = numbers[start : start + CAPTIONS_AT_A_TIME]
                padded = torch.full((CAPTIONS_AT_A_TIME, length), encoder.tokenizer.pad_token_id or 0)
                mask = torch.zeros((CAPTIONS_AT_A_TIME, length), dtype=torch.int64)
                mask[:, 0] = 1  # where there is no caption, too: softmax over nothing is NaN
                for row, number in enumerate(few):
                    padded[row, : len(ids[number])] = torch.tensor(ids[number])
                    mask[row, : len(ids[number])] = 1
                with computing_in(encoder.model.device, self.precision):
                    embeddings, _ = embed(encoder.model, padded, mask)
                embeddings = embeddings.to(self.dtype).cpu().numpy()
                for row, number in enumerate(few):
                    found[captions[number]] = Embedded(embeddings[row, : len(ids[number])].copy(), cut[number])
        self._remember(known, found)
        return found

    def _remember(self, known: dict[str, Embedded], found: dict[str, Embedded]) -> None:
        with self._lock:
            self._known_bytes += sum(embedded.text.nbytes for embedded in found.values())
            if self._known_bytes > KNOWN_BYTES:
                for texts in self._known:
                    texts.clear()
                self._known_bytes = 0
            else:
                known.update(found)

    def null(self) -> list[np.ndarray]:
        """The empty caption, (L, D) for each encoder."""
        return [texts[0] for texts in self([""])[0]]

    def info(self, cut: Sequence[int]) -> tuple[TextInfo, ...]:
        """What the manifest says of them, so many captions having been cut by each."""
        return tuple(
            TextInfo(encoder.name, encoder.hash, encoder.width, max_tokens(encoder.tokenizer), number)
            for encoder, number in zip(self.encoders, cut, strict=True)
        )
