"""The text encoders of an export: captions -> embeddings, reproducible to the byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from ldm.data.latent_schema import TextInfo
from ldm.data.manifest import relative_path
from ldm.errors import UsageError
from ldm.latents.compute import Dtype, Precision, autocast, require_precision
from ldm.models.text_encoder import TextChoice, TextEncoder, TextEncoderConfig, embed

# captions in a forward pass, and the multiple that their lengths are padded to
BATCH_CAPTIONS, TOKENS_STEP = 16, 8
# of a GPU, which so few tokens would leave idle: the tokens in a pass, unless the captions are fewer than on a CPU
GPU_TOKENS, GPU_TOKENS_STEP = 2048, 16
# embeddings cached for captions that occur again
CACHED_BYTES = 2**28


class Embedded(NamedTuple):
    """A caption's embedding (L, D), and whether the caption was truncated."""

    text: np.ndarray
    cut: bool


def call_shape(tokens: int, limit: int, device: torch.device) -> tuple[int, int]:
    """Captions and tokens of the forward pass that a caption is encoded in.

    They follow from the caption's own ``tokens``, at most ``limit``, and the device: the kernels, and so the last bits of the
    embedding, depend on them.
    """
    step = TOKENS_STEP if device.type == "cpu" else GPU_TOKENS_STEP
    length = min(-(-tokens // step) * step, limit)
    return BATCH_CAPTIONS if device.type == "cpu" else max(GPU_TOKENS // length, BATCH_CAPTIONS), length


class TextEncoders:
    """One or several frozen text encoders that encode every caption; thread-safe.

    A caption's embedding is the same to the last bit whichever captions share its batch: every call has a fixed number of
    captions (padded where there are fewer) and a length that depends on the caption alone, rounded up. So embeddings of
    repeated captions, common in most data sets, can be cached without any effect on the bytes written.
    """

    def __init__(self, encoders: Sequence[TextEncoder], dtype: Dtype, precision: Precision):
        require_precision(encoders[0].model.device, precision)
        self.encoders, self.dtype = encoders, getattr(torch, dtype)
        self.precision: Precision = precision
        self._cached: list[dict[str, Embedded]] = [{} for _ in encoders]
        self._cached_bytes = 0
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        configs: TextChoice,
        device: torch.device | str,
        dtype: Dtype,
        precision: Precision,
    ) -> TextEncoders:
        """Load what :meth:`TextEncoder.load` takes, one or several. Raises :class:`UsageError` for none, or one twice."""
        configs = [configs] if isinstance(configs, str | TextEncoderConfig) else configs
        if not configs or len(set(configs)) != len(configs):
            raise UsageError(f"text encoders are {' '.join(map(str, configs)) or 'missing'}; give one or more, each once")
        encoders = [TextEncoder.load(config, device) for config in configs]
        if len(encoders) > 1 and any(encoder.is_unconditional for encoder in encoders):
            raise UsageError("text encoder none is of unconditional models; give it alone")
        return cls(encoders, dtype, precision)

    @property
    def is_unconditional(self) -> bool:
        """Whether captions make no difference, so that images need none."""
        return self.encoders[0].is_unconditional

    def lookup(self, captions: Iterable[str]) -> list[dict[str, Embedded]]:
        """For each encoder the embedding of each caption."""
        wanted = set(captions)
        found = []
        for encoder, known in zip(self.encoders, self._cached, strict=True):
            # `get`: another thread may clear the cache
            here = {caption: embedded for caption in wanted if (embedded := known.get(caption)) is not None}
            found.append(here | self._encode(encoder, known, sorted(wanted - here.keys())))
        return found

    def _encode(self, encoder: TextEncoder, known: dict[str, Embedded], captions: list[str]) -> dict[str, Embedded]:
        if not captions:
            return {}
        limit, pad = encoder.max_tokens, encoder.tokenizer.pad_token_id
        with self._lock:  # tokenizers are not thread-safe
            ids = encoder.tokenize(captions)
            cut = [len(tokens) > limit for tokens in ids]
            if any(cut):
                ids = encoder.tokenize(captions, cut=True)
        device = encoder.model.device
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, tokens in enumerate(ids):
            by_shape.setdefault(call_shape(len(tokens), limit, device), []).append(number)
        found = {}
        for (batch, length), numbers in by_shape.items():
            for start in range(0, len(numbers), batch):
                few = numbers[start : start + batch]
                padded = torch.full((batch, length), pad if isinstance(pad, int) else 0)
                mask = torch.zeros((batch, length), dtype=torch.int64)
                mask[:, 0] = 1  # padding rows too: softmax over an empty set is NaN
                for row, number in enumerate(few):
                    padded[row, : len(ids[number])] = torch.tensor(ids[number])
                    mask[row, : len(ids[number])] = 1
                with autocast(device, self.precision):
                    embeddings, _ = embed(encoder.model, padded, mask)
                embeddings = embeddings.to(self.dtype).cpu().numpy()
                for row, number in enumerate(few):
                    found[captions[number]] = Embedded(embeddings[row, : len(ids[number])].copy(), cut[number])
        with self._lock:
            self._cached_bytes += sum(embedded.text.nbytes for embedded in found.values())
            if self._cached_bytes > CACHED_BYTES:
                for texts in self._cached:
                    texts.clear()
                self._cached_bytes = 0
            else:
                known.update(found)
        return found

    def null(self) -> list[np.ndarray]:
        """The encoded empty caption, (L, D) for each encoder."""
        return [known[""].text for known in self.lookup([""])]

    def info(self, cut: Sequence[int], out: Path) -> tuple[TextInfo, ...]:
        """Their entries in the manifest of the folder ``out``; ``cut``: how many captions each truncated."""
        return tuple(
            TextInfo(
                encoder.name,
                encoder.hash,
                encoder.width,
                encoder.max_tokens,
                number,
                None if encoder.folder is None else relative_path(encoder.folder, out),
                encoder.settings,
            )
            for encoder, number in zip(self.encoders, cut, strict=True)
        )
