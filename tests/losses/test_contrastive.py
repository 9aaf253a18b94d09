"""The losses of image–text matching against those of transformers, and what counts as the right caption."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from ldm.losses.contrastive import contrastive_loss, retrieval_accuracy, same_rows, sigmoid_loss


def test_without_equal_captions_they_are_clips_and_siglips() -> None:
    torch.manual_seed(0)
    logits, alone = torch.randn(6, 6), torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(contrastive_loss(logits, alone), image_text_contrastive_loss(logits))
    signs = 2 * torch.eye(6) - 1  # as SiglipModel computes it
    torch.testing.assert_close(sigmoid_loss(logits, alone), -F.logsigmoid(signs * logits).sum(-1).mean())


def test_a_caption_that_two_images_share_is_right_for_both() -> None:
    captions = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0 + 1e-5]])
    same = same_rows(captions)
    assert same.tolist() == [[True, False, True], [False, True, False], [True, False, True]]
    perfect = torch.where(same, 50.0, -50.0)  # a coin for the two that are equal
    torch.testing.assert_close(contrastive_loss(perfect, same), torch.tensor(2 / 3).mul(torch.tensor(2.0).log()))
    vectors = F.normalize(torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    assert retrieval_accuracy(vectors, vectors[[2, 1, 0]], same).tolist() == [1, 1, 1]
    assert retrieval_accuracy(vectors, vectors[[1, 0, 2]], same).tolist() == [0, 0, 1]
