"""Textual inversion: a new word's embedding is trained, and no network. Read :class:`TextualInversion` first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from ldm.data.datamodule import ShardDataModule
from ldm.errors import UsageError
from ldm.models.dit import transformer_blocks
from ldm.models.learned_token import LearnedToken, write_token
from ldm.models.text_encoder import TextEncoder
from ldm.training.denoiser import DenoiserTraining
from ldm.training.ema import PowerAverages

# training samples whose captions are searched for the token
SEARCHED = 64


class TokenEmbedding(nn.Module):
    """The rows of a new token in the text encoder's table of embeddings: the only weights that are trained."""

    def __init__(self, vectors: Tensor):
        """``vectors``: (V, D)."""
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().clone())

    def attach(self, encoder: TextEncoder, first: int) -> None:
        """Take the place of the rows from ``first`` on whenever the encoder looks up embeddings. Raises :class:`UsageError` for
        an encoder that does more than look them up."""
        table = encoder.model.get_input_embeddings()
        for module in encoder.model.modules():
            if getattr(module, "weight", None) is not getattr(table, "weight", None):
                continue
            if type(module) is not nn.Embedding:
                raise UsageError(
                    f"{encoder.name} has embeddings of its own kind ({type(module).__name__}); take another encoder"
                )

            def look_up(module: nn.Module, inputs: tuple[Tensor, ...], found: Tensor) -> Tensor:
                number = inputs[0] - first  # (B, L)
                own = self.vectors.to(found.dtype)[number.clamp(0, len(self.vectors) - 1)]  # (B, L, D)
                return torch.where((number >= 0)[..., None], own, found)

            module.register_forward_hook(look_up)


class TextualInversion(DenoiserTraining):
    """The embedding of a new token that stands for a few images, trained through a frozen text encoder and denoiser (Gal et al.
    2022, arXiv 2208.01618). A step is that of :class:`ldm.training.denoiser.DenoiserTraining`.

    What is exported is a file of some kilobytes, ``learned_embeds.safetensors``, as diffusers' ``load_textual_inversion`` and
    other programs read it: the token and its (V, D) vectors.
    """

    command, artifact = "embedding", "embedding"

    def __init__(self, token: str, initial: str, vectors: int = 1, **settings: Any):
        """
        Args:
            token: the new word, as ``<sks>``; captions hold it: ``a photo of <sks>``.
            initial: words that say roughly what it is, whose embeddings it begins with.
            vectors: embeddings that the token is made of, at least as many as the initial words have tokens.
            settings: see :class:`ldm.training.denoiser.DenoiserTraining`; with ``init_from`` and ``online``.
        """
        super().__init__(**settings)
        self.token, self.initial_words, self.num_vectors = token, initial, vectors
        if not (self.init_from and self.online):
            raise UsageError("a token is trained for a model, on images: give init_from, and set online")
        denoiser_s = {"freeze": self.frozen, "fp8": self.fp8, "auxiliary_losses": self.losses, "evaluation": self.evaluation}
        for name, given in (denoiser_s | {"adapter": self.adapter_config}).items():
            if given:
                raise UsageError(
                    f"{name} is for the denoiser's training, and only a token's embedding is trained; leave it out"
                )
        if self.optimiser.muon_learning_rate is not None:
            raise UsageError("muon_learning_rate is for matrices, and a token's embedding is none; leave it out")
        self.denoiser.requires_grad_(False)
        self.embedding: TokenEmbedding | None = None  # from prepare or a checkpoint on

    def averaged(self) -> nn.Module:
        assert self.embedding is not None, "made by prepare"
        return self.embedding

    def start_average(self, decay: float, power: PowerAverages | None = None, offload: bool = False) -> None:
        self._averaging = decay, power, offload
        if getattr(self, "embedding", None) is not None:  # else there is nothing to average yet
            super().start_average(decay, power, offload)

    def is_absent(self, name: str) -> bool:
        """Checkpoints hold the embedding alone."""
        return name.startswith("denoiser.")

    @property
    def config(self) -> Any:
        return self.denoiser.config

    def blocks(self) -> list[nn.Module]:
        return transformer_blocks(self.denoiser)

    def _network_config(self) -> dict[str, Any]:
        return {"token": self.token}

    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        return self.encoders.encode_captions(captions, self.online_precision, differentiable=torch.is_grad_enabled())

    # -- setup -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise UsageError(
                "a token's embedding is too small for fsdp, which would shard it; train with ddp, or on one process"
            )
        super().setup(stage)

    def prepare(self, data: ShardDataModule) -> None:
        super().prepare(data)
        if len(self.encoders.text_encoders) > 1:
            raise UsageError("a token is trained in one text encoder, and the model has several; this is not supported")
        (encoder,) = self.encoders.text_encoders
        known = self.initial and self.initial.trained_on.get("text_encoder")
        if known not in (None, encoder.hash):  # which is that of the encoder without the token
            assert self.initial is not None
            raise UsageError(
                f"{self.initial.source} was trained with the text encoder {known[:12]}, and {encoder.name} is "
                f"{encoder.hash[:12]}; give the former as text_encoder"
            )
        self._require_captions(data)
        first, table = encoder.add_token(self.token, self.num_vectors, self.initial_words)
        if self.embedding is None:
            self._make(table)
        assert self.embedding is not None
        self.embedding.attach(encoder, first)

    def _make(self, vectors: Tensor) -> None:
        self.embedding = TokenEmbedding(vectors)
        self.start_average(*self._averaging)

    def _require_captions(self, data: ShardDataModule) -> None:
        """Refuse data without the token in their captions."""
        samples, spec = data.train_set, data.train_set.sources[0].spec
        few = range(0, len(samples), -(-len(samples) // SEARCHED))
        if not any(self.token.lower() in samples[number]["caption"].lower() for number in few):
            raise UsageError(f"no caption of {spec} holds {self.token}; give captions that do, as in 'a photo of {self.token}'")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.initial is None:
            raise UsageError(f"the weights of {self.init_from} were not loaded; train by ldm embedding fit, or call start_from")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.embedding is None:
            self._make(checkpoint["state_dict"]["embedding.vectors"])
        super().on_load_checkpoint(checkpoint)

    # -- previews, export --------------------------------------------------------------------------------------------

    def preview(self) -> Any:
        self._embeds.clear()  # the token's embedding has changed
        return super().preview()

    def save(self, folder: Path) -> None:
        assert self.embedding is not None
        (encoder,) = self.encoders.text_encoders
        record = {
            "token": self.token,
            "initial": self.initial_words,
            "text_encoder": encoder.hash,
            "steps": self.average.step,
            "learning_rate": self.optimiser.learning_rate,
        }
        write_token(folder, LearnedToken(self.token, self.embedding.vectors.detach().cpu(), record))
