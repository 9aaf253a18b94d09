"""Feature networks: images -> features, and for networks of images and text also texts -> features of the same space.

Metrics of images compare features. Each network says its name, which is part of the names of its metrics, and the hash of all
that determines its features, so that values of different networks are never taken for one another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from ldm.errors import UsageError, first_line
from ldm.files import sha256_file
from ldm.models.directories import in_memory, loading, read_config, require_regular_files
from ldm.models.fingerprint import network_hash
from ldm.models.matcher import ImageTextModel, is_matcher
from ldm.models.text_encoder import architecture_of, max_tokens

CONVOLUTIONS = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}
# the networks of published results, by their names on the hub: FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) and CMMD
# (Jayasumana et al. 2024, arXiv 2401.09603)
ON_THE_HUB = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
NAMES = ("inception", *ON_THE_HUB, *(f"{kind}-random" for kind in CONVOLUTIONS))
WAYS = (
    f"give one of {', '.join(NAMES)}, a hub name, or the path of a matcher (ldm matcher fit), of a CLIP, SigLIP or DINOv2 of "
    "transformers or of torchvision's checkpoint of alexnet or vgg16"
)


class FeatureNetwork(nn.Module):
    """A frozen network that gives features of images.

    A subclass defines :meth:`forward`; one of images and text also :meth:`embed_texts`, and has ``takes_texts``.

    Attributes:
        name: of letters, digits and underscores, for names of metrics; where several weights share an architecture, with the
            first digits of a hash: ``dinov2_397923af``.
        description: the same in words.
        hash: hex sha256 of all that determines the features.
        resize: how images reach the network's size: the filter, and the sides in pixels.
        num_features: D.
        takes_texts: whether it has features of texts.
    """

    name: str
    description: str
    hash: str
    resize: str
    num_features: int
    takes_texts: bool = False

    def forward(self, images: Tensor) -> Tensor:
        """Features of images: (B, 3, H, W) in [−1, 1], of any size -> (B, D) float32, on the images' device."""
        raise NotImplementedError

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, to be compared with those of images by their cosine: (B, D) float32."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FeatureNetwork:
        """It is frozen: it stays in evaluation mode while a module that holds it trains."""
        return super().train(False)


def load_feature_network(name: str | os.PathLike, device: torch.device | str = "cpu") -> FeatureNetwork:
    """The feature network of a name.

    Args:
        name:
            - ``inception``: torch-fidelity's Inception-v3, of the published FID and KID.
            - ``dinov2``, ``clip``: DINOv2 ViT-L/14 and CLIP ViT-L/14 at 336 pixels; or any other hub name, or the directory, of
              a network of images (DINOv2, ViT) or of images and text (CLIP, SigLIP) that transformers opens.
            - the directory of a matcher, trained on images of one's own (:mod:`ldm.training.matcher`); offline.
            - ``alex-random``, ``vgg-random``: torchvision's convolutions with random weights of a fixed seed; offline.
            - the path of torchvision's checkpoint of alexnet or vgg16.

    Raises:
        UsageError: where it is not available; nothing is taken in its place.
    """
    name = str(name)
    kind = name.removesuffix("-random")
    if name == "inception":
        network: FeatureNetwork = Inception()
    elif name.endswith("-random") and kind in CONVOLUTIONS:
        network = _random(kind)
    elif os.path.isfile(name):
        network = _pretrained(Path(name))
    elif is_matcher(name):
        network = MatcherNetwork(name)
    elif os.path.isdir(name) or name in ON_THE_HUB or re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        network = TransformersNetwork(name)
    else:
        raise UsageError(f"the feature network {name} does not exist; {WAYS}")
    return cast(FeatureNetwork, network.requires_grad_(False).eval().to(device))


class MatcherNetwork(FeatureNetwork):
    """A matcher: its vectors of images and of texts, at the size in pixels that it was trained on."""

    takes_texts = True

    def __init__(self, folder: str):
        """Raises UsageError where ``folder`` holds no matcher, or its parts are not those that were saved."""
        super().__init__()
        self.model = ImageTextModel.load(folder)
        parts = self.model.matcher, self.model.autoencoder, self.model.text_encoder.model
        self.parts = nn.ModuleList(cast(nn.Module, part) for part in parts)  # to be moved together
        self.hash, self.num_features = self.model.hash, self.model.matcher.config["embedding_size"]
        self.name, self.description = f"matcher_{self.hash[:8]}", f"matcher, {folder}"
        sizes = ", ".join(f"{width} x {height}" for height, width in self.model.sizes)
        self.resize = f"bicubic, antialiased, to {sizes}" + ", that of the nearest proportions" * (len(self.model.sizes) > 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.embed_texts(texts)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [−1, 1] as uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


class Inception(FeatureNetwork):
    """Inception-v3 as FID means it, with torch-fidelity's weights: its last features before the classifier, of bytes."""

    name, description, num_features = "inception", "inception", 2048
    resize = "bilinear without antialiasing, as TensorFlow 1 has it, to 299 x 299"

    def __init__(self) -> None:
        """Raises UsageError where the weights cannot be had."""
        super().__init__()
        from torch_fidelity import feature_extractor_inceptionv3 as inception

        try:
            self.network = inception.FeatureExtractorInceptionV3("inception-v3-compat", [str(self.num_features)])
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"the weights of the feature network inception cannot be loaded ({first_line(error)}); put "
                f"{inception.URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints, or take another network "
                "(alex-random, vgg-random, a path)"
            ) from error
        self.hash = network_hash(self.network, {"network": self.name, "resize": self.resize})

    def forward(self, images: Tensor) -> Tensor:
        return self.network(to_bytes(images))[0]


class Convolutions(FeatureNetwork):
    """The last features of torchvision's alexnet or vgg16, averaged over pixels. Images keep their own size, down to the one at
    which a layer would have no output."""

    resize = "none"
    mean: Tensor
    std: Tensor

    def __init__(self, kind: str):
        super().__init__()
        with torch.device("meta"):  # neither memory nor time for the classifier, which is not used
            features = CONVOLUTIONS[kind](weights=None).features
        self.kind, self.layers = kind, features[:-1]  # without the last pooling
        self.num_features = next(layer.out_channels for layer in reversed(self.layers) if isinstance(layer, nn.Conv2d))
        self.smallest = {"alex": 31, "vgg": 16}[kind]
        # ImageNet's, which these networks were trained with
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def named(self, name: str, description: str) -> Convolutions:
        """This network, once it has its weights."""
        self.name, self.description, self.hash = name, description, network_hash(self.layers, {"network": self.kind})
        return self

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest:
            raise UsageError(
                f"the feature network {self.description} needs images of {self.smallest} pixels a side, not "
                f"{width} x {height}; take larger ones, or another network"
            )
        return self.layers(((images + 1) / 2 - self.mean) / self.std).mean((2, 3))


def _random(kind: str) -> Convolutions:
    """Weights that keep the variance from layer to layer (He et al. 2015, arXiv 1502.01852), the same ones each time."""
    network = Convolutions(kind)
    network.layers.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(cast(Tensor, layer.bias))
    return network.named(f"{kind}_random", f"{kind}, random weights")


def _pretrained(checkpoint: Path) -> Convolutions:
    """The network whose torchvision checkpoint this is."""
    complaint = UsageError(f"{checkpoint} is not torchvision's checkpoint of alexnet or vgg16; {WAYS}")
    try:
        weights = torch.load(checkpoint, weights_only=True, map_location="cpu")
        weights = {name.removeprefix("features."): w for name, w in weights.items() if name.startswith("features.")}
        shapes = {name: weight.shape for name, weight in weights.items() if weight.isfinite().all()}
    except Exception as error:  # bytes that are not torch's make its readers raise anything
        raise complaint from error
    for kind in CONVOLUTIONS:
        network = Convolutions(kind)
        expected = network.layers.state_dict()
        if shapes == {name: w.shape for name, w in expected.items()}:
            network.layers.load_state_dict(weights, assign=True)
            return network.named(f"{kind}_{sha256_file(checkpoint)[:8]}", f"{kind}, {checkpoint}")
    raise complaint


class TransformersNetwork(FeatureNetwork):
    """A network of images (DINOv2, ViT), or of images and text (CLIP, SigLIP), of transformers, with its own image processor.

    Features are those that it compares with texts, or its pooled output, which of DINOv2 is the class token.
    """

    def __init__(self, name: str):
        """``name``: of :data:`ON_THE_HUB`, another hub name, or a directory. Raises UsageError where it cannot be loaded."""
        super().__init__()
        where: Any = ON_THE_HUB.get(name, name)
        if os.path.isdir(name):
            where = name
            require_regular_files(Path(name))
            if not os.path.lexists(config := Path(name) / "config.json"):
                raise UsageError(f"{name} is not the directory of a feature network (no config.json); {WAYS}")
            read_config(config)
        with loading(f"the feature network {name} cannot be loaded", WAYS):
            kind = AutoConfig.from_pretrained(where, trust_remote_code=False).model_type
            self.processor = AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
            self.model: Any = AutoModel.from_pretrained(where, trust_remote_code=False, dtype=torch.float32)
            in_memory(self.model)
            self.takes_texts = hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")
            self.tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False) if self.takes_texts else None
            self.model.eval()
            with torch.no_grad():  # some configs fail only here
                self.num_features = self(torch.zeros(1, 3, 32, 32)).shape[1]
        settings = {name: value for name, value in self.processor.to_dict().items() if "processor" not in name}
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else None
        parts = {"processor": settings, "vocabulary": vocabulary}
        self.hash = network_hash(self.model, architecture_of(self.model) | parts)
        self.name = f"{re.sub(r'[^a-z0-9]+', '_', kind.lower())}_{self.hash[:8]}"
        self.description = f"{kind}, {name}"
        size, crop = (" x ".join(map(str, dict(settings.get(part) or {}).values())) for part in ("size", "crop_size"))
        how = Image.Resampling(settings["resample"]).name.lower() if settings.get("resample") is not None else "unknown filter"
        side = "the shorter side to " if "shortest_edge" in dict(settings.get("size") or {}) else "to "
        self.resize = f"{how}, antialiased, {side}{size}" + (
            f", then its centre {crop}" if settings.get("do_center_crop") else ""
        )

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=to_bytes(images), return_tensors="pt")["pixel_values"].to(images.device)
        found = self.model.get_image_features(pixel_values=pixels) if self.takes_texts else self.model(pixel_values=pixels)
        return found.pooler_output.flatten(1).float()

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        assert self.tokenizer is not None
        limit = {"truncation": True, "max_length": max_tokens(self.tokenizer), "padding": "max_length"}
        tokens = self.tokenizer([*texts], return_tensors="pt", **limit).to(self.model.device)
        return self.model.get_text_features(**tokens).pooler_output.float()
