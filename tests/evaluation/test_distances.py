"""Metrics of features: known answers, and those of torch-fidelity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from ldm.evaluation.distances import (
    clip_scores,
    density_coverage,
    distance_metrics,
    frechet_distance,
    kernel_distance,
    maximum_mean_discrepancy,
    nearest,
    retrieval_accuracy,
    vendi_score,
)


def features(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mixed + shift


@pytest.mark.parametrize(("count", "width"), [(120, 8), (20, 48)], ids=["more images", "more features"])
def test_fid_and_kid_are_torch_fidelity_s(count: int, width: int) -> None:
    real, made = features(count, width, 0), features(count, width, 1, 0.3)
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (real, made)), verbose=False)[KEY_METRIC_FID]
    assert frechet_distance(real, made) == pytest.approx(expected, rel=1e-3)
    settings = {"kid_subsets": 100, "kid_subset_size": count, "verbose": False}
    assert kernel_distance(real, made) == pytest.approx(
        kid_features_to_metric(made, real, **settings)[KEY_METRIC_KID_MEAN], rel=1e-3
    )
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_known_answers() -> None:
    """Equal and orthogonal sets; a shift of a Gaussian; CMMD from its definition."""
    real = features(64, 6, 0)
    assert frechet_distance(real, real + 2) == pytest.approx(6 * 2**2)
    assert vendi_score(torch.ones(9, 4)) == pytest.approx(1) and vendi_score(torch.eye(7)) == pytest.approx(7)
    assert vendi_score(torch.eye(4).repeat(6, 1)) == pytest.approx(4)
    same = distance_metrics(real, real, of_texts=True)
    assert same["cmmd"] == pytest.approx(0, abs=1e-9) and same["precision"] == same["recall"] == same["coverage"] == 1
    far = distance_metrics(real, real + 100, of_texts=True)
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0
    # every real ball holds all copies of its centre: 64 balls of 64 images, over 5, over 64
    assert density_coverage(real, real[:1].repeat(10, 1))[0] >= 1 / 5
    other = features(32, 6, 1)
    unit = [torch.nn.functional.normalize(each.double(), dim=1) for each in (real, other)]

    def mean_kernel(first: Tensor, second: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(first, second).square() / (2 * 10**2)).mean()

    expected = mean_kernel(unit[0], unit[0]) + mean_kernel(unit[1], unit[1]) - 2 * mean_kernel(*unit)
    assert maximum_mean_discrepancy(real, other) == pytest.approx(1000 * float(expected), rel=1e-6)
    distances, numbers = nearest(real[5:9], real)
    assert numbers.tolist() == [5, 6, 7, 8] and float(distances.max()) < 1e-6
    many = features(5000, 2, 3)  # sought in parts
    own = torch.tensor([0, 2047, 2048, 4999])
    every = torch.cdist(many[own].double(), many.double())
    distances, numbers = nearest(many[own], many, own)
    torch.testing.assert_close((distances, numbers), tuple(every.scatter(1, own[:, None], torch.inf).min(1)))


def test_agreement_falls_with_the_share_of_shuffled_captions() -> None:
    texts, captions = torch.eye(24), [f"caption {number}" for number in range(24)]
    images = texts + 0.05 * torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    found = []
    for shuffled in (0, 6, 12, 24):
        order = [*torch.arange(shuffled).roll(1).tolist(), *range(shuffled, 24)]
        names = [captions[number] for number in order]
        accuracy = retrieval_accuracy(images, texts[order], names, candidates=10)
        found.append((accuracy, float(clip_scores(images, texts[order]).mean())))
    assert found == sorted(found, reverse=True) and len({*found}) == 4
    assert found[0][0] == 1 and found[0][1] > 90 and found[3][0] < 0.2
    # one of the same words counts as the image's own
    assert retrieval_accuracy(images, texts[:1].repeat(24, 1), ["same"] * 24) == 1
