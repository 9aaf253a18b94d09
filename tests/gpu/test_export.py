"""An export on a pretended GPU keeps two streams, and waits for the results of its batches alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.latent_dataset import LatentDataset
from ldm.latents.text_encoders import BATCH_CAPTIONS, GPU_TOKENS
from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu
from tests.tiny import TinyRuns

pytestmark = needs_pretended_gpu

BATCHES = 12  # of two of the 10, 10 and 4 images


def export(counts: Any, folder: str, text_encoder: str, out: str) -> dict[str, Any]:
    """The waits by line, how many streams are made, and the shapes of the text encoder's calls."""
    import torch
    from transformers import PreTrainedModel

    from ldm.latents.export import export_latents

    streams, shapes = [], []
    make, call = torch.cuda.Stream.__new__, PreTrainedModel.__call__

    def made(*given: Any, **named: Any) -> Any:
        streams.extend(() if "stream_id" in named else [1])  # otherwise it stands for one that exists
        return make(*given, **named)

    def called(model: Any, *given: Any, **named: Any) -> Any:
        shapes.append(named["input_ids"].shape)
        return call(model, *given, **named)

    torch.cuda.Stream.__new__, PreTrainedModel.__call__ = made, called
    export_latents(f"{folder}/autoencoder", f"{folder}/shards", out, text_encoder, batch_size=2, flip=True)
    return {"waits": dict(counts.waits), "streams": len(streams), "shapes": shapes}


def test_it_keeps_two_streams_and_waits_for_results_alone(tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path: Path) -> None:
    found = on_pretended_gpu(export, str(tiny_runs.folder), tiny_text_encoder, str(tmp_path / "latents"))
    assert found["streams"] == 2
    calls = found["shapes"][1:]  # the first is a check of the encoder that was loaded
    assert all(batch > BATCH_CAPTIONS and batch * length > GPU_TOKENS - length for batch, length in calls)
    waits: Counter[str] = Counter()
    for place, times in found["waits"].items():
        why, _, line = place.rpartition(" at ")
        waits[f"{why} {line.partition(':')[0]}"] += times
    assert waits["copy to the host, blocking, ldm/latents/image_encoder.py"] == BATCHES
    assert waits["copy to the host, blocking, ldm/latents/text_encoders.py"] == len(calls)
    assert not [place for place in waits if "image_encoder" in place and "to the host" not in place]
    on_gpu, on_cpu = LatentDataset(tmp_path / "latents"), LatentDataset(tiny_runs.folder / "latents")
    for number in range(24):
        for name in ("mean", "std", "text"):
            np.testing.assert_allclose(on_gpu[number][name], on_cpu[number][name], rtol=1e-2, atol=2e-3)
