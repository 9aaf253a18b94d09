"""Metrics of sets of images by their features, (N, D) float32: how far two sets are apart, how varied one is, and how well
images agree with their captions. Sums and kernels are in float64, whatever the network computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEIGHBOURS = 5  # of density and coverage
PRECISION_NEIGHBOURS = 3
LEAST = NEIGHBOURS + 1  # images of a set
KID_SUBSET = 1000
CANDIDATES = 100  # captions that an image's own one is sought among
_ROWS = 2048  # of a matrix of pairs, which bounds the memory


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """The Fréchet distance of Gaussians with the sets' means and covariances (FID, Heusel et al. 2017, arXiv 1706.08500):
    |m₁ − m₂|² + tr S₁ + tr S₂ − 2 tr (S₁ S₂)^½.

    The last trace is the sum of the singular values of A Bᵀ, where S₁ = AᵀA and S₂ = BᵀB: no eigenvalues of a matrix that is
    not symmetric, whose rounding makes them negative or complex. Fewer images give a larger distance (Chong & Forsyth 2020,
    arXiv 1911.07023).
    """
    first, second = _root_of_covariance(real), _root_of_covariance(generated)
    apart = (real.double().mean(0) - generated.double().mean(0)).square().sum()
    trace = first.square().sum() + second.square().sum() - 2 * torch.linalg.svdvals(first @ second.T).sum()
    return max(float(apart + trace), 0.0)


def _root_of_covariance(features: Tensor) -> Tensor:
    """A of S = AᵀA, (min(N, D), D)."""
    centred = (features.double() - features.double().mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401), torch-fidelity's: the unbiased squared MMD under (x·y / D + 1)³, mean of
    100 random subsets of 1,000 images, or of all where there are fewer. Without bias it may be a little under 0."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(KID_SUBSET, len(real), len(generated))
    subsets = 1 if size == len(real) == len(generated) else 100
    settings = {"kid_subset_size": size, "kid_subsets": subsets, "verbose": False}
    return kid_features_to_metric(generated, real, **settings)[KEY_METRIC_KID_MEAN]


def maximum_mean_discrepancy(real: Tensor, generated: Tensor) -> float:
    """1000 times the squared MMD of normalised features under a Gaussian kernel of σ = 10; of CLIP's features it is CMMD
    (Jayasumana et al. 2024, arXiv 2401.09603)."""
    real, generated = normalised(real).double(), normalised(generated).double()

    def kernel_mean(first: Tensor, second: Tensor) -> float:
        # of unit vectors |x − y|² = 2 − 2 x·y; 1 is taken from the kernel, whose values are near it
        sums = [float(torch.expm1((rows @ second.T - 1) / 10**2).sum()) for rows in first.split(_ROWS)]
        return sum(sums) / (len(first) * len(second))

    return 1000 * (kernel_mean(real, real) + kernel_mean(generated, generated) - 2 * kernel_mean(real, generated))


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """torch-fidelity's: the share of generated images within a ball of a real one, which reaches to its third neighbour among
    real ones, and the share of real ones within the balls of generated ones (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    return calculate_precision_recall_part(generated, real, PRECISION_NEIGHBOURS, _ROWS)


def density_coverage(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """With balls around real images that reach to their fifth neighbours: how many balls hold a generated image, over 5, which
    may be above 1; and the share of balls that hold one (Naeem et al. 2020, arXiv 2002.09797)."""
    inside, covered = 0, 0
    for rows in real.double().split(_ROWS):
        radius = torch.cdist(rows, real.double()).kthvalue(NEIGHBOURS + 1).values  # the nearest is the image itself
        within = torch.cdist(rows, generated.double()) < radius[:, None]
        inside, covered = inside + int(within.sum()), covered + int(within.any(1).sum())
    return inside / (NEIGHBOURS * len(generated)), covered / len(real)


def nearest(images: Tensor, others: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each image the Euclidean distance to the nearest of ``others``, (N,), and its number, (N,); ``own``: the number of one
    that it is not compared with, (N,)."""
    images, values, numbers = images.double(), [], []
    for start in range(0, len(others), _ROWS):
        distances = torch.cdist(images, others[start : start + _ROWS].double())
        if own is not None:
            (rows,) = torch.where((own >= start) & (own < start + distances.shape[1]))
            distances[rows, own[rows] - start] = torch.inf
        found = distances.min(1)
        values, numbers = [*values, found.values], [*numbers, found.indices + start]
    best = torch.stack(values).min(0)
    return best.values, torch.stack(numbers).gather(0, best.indices[None])[0]


def vendi_score(features: Tensor) -> float:
    """How many different images a set is worth: the exponential of the entropy of the eigenvalues of its matrix of cosines over
    N (Friedman & Dieng 2023, arXiv 2210.02410); 1 for equal images, N for orthogonal features."""
    vectors = normalised(features).double() / len(features) ** 0.5
    gram = vectors.T @ vectors if len(vectors) > vectors.shape[1] else vectors @ vectors.T  # of the same eigenvalues
    return float(torch.special.entr(torch.linalg.eigvalsh(gram).clamp(min=0)).sum().exp())


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """Of each image 100 times the cosine with its caption's features, at least 0, (N,); of CLIP's features their mean is
    CLIPScore (Hessel et al. 2021, arXiv 2104.08718) as torchmetrics scales it."""
    return 100 * (normalised(images) * normalised(texts)).sum(1).clamp(min=0)


def retrieval_accuracy(images: Tensor, texts: Tensor, captions: Sequence[str], candidates: int = CANDIDATES) -> float:
    """The share of images that agree with their own caption more than with all others of ``candidates`` captions, which are
    those of images beside them; one of the same words counts as the image's own."""
    images, texts, right = normalised(images), normalised(texts), 0
    for start in range(0, len(images), candidates):
        first = max(min(start, len(images) - candidates), 0)
        best = (images[start : start + candidates] @ texts[first : first + candidates].T).argmax(1) + first
        right += sum(captions[found] == captions[start + row] for row, found in enumerate(best.tolist()))
    return right / len(images)


def normalised(features: Tensor) -> Tensor:
    """Each row over its length; zeros stay."""
    return torch.nn.functional.normalize(features, dim=1)


def distance_metrics(real: Tensor, generated: Tensor, of_texts: bool) -> dict[str, float]:
    """All metrics of two sets: ``fid``, ``kid``, ``precision``, ``recall``, ``density``, ``coverage``; and of a network that is
    also of texts, ``cmmd``. Each set has :data:`LEAST` images or more."""
    precision, recall = precision_recall(real, generated)
    density, coverage = density_coverage(real, generated)
    found = {"fid": frechet_distance(real, generated), "kid": kernel_distance(real, generated)}
    found |= {"cmmd": maximum_mean_discrepancy(real, generated)} if of_texts else {}
    return found | {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
