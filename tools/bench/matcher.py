"""Whether a matcher's agreement ranks the checkpoints of a training on shapes as the pixel scorer does.

python tools/bench/matcher.py --run runs/denoiser --matcher runs/matcher/matcher --steps 50 100 200 400 800
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common  # first
import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.regression import spearman_corrcoef

from ldm.evaluation.features import load_feature_network
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.models.autoencoder import pixels_to_images
from ldm.pipeline import load_pipeline
from ldm.runs.export import export_run
from ldm.runs.layout import RunFolder, checkpoint_name
from ldm.shapes.scenes import held_out_prompts, seen_prompts
from ldm.training.denoiser import DenoiserTraining


def main() -> None:
    """Print prompt accuracy and agreement of each checkpoint, and their rank correlation."""
    parser = common.bench_parser(__doc__, "few prompts and denoising steps")
    parser.add_argument("--run", type=Path, default=Path("runs/denoiser"), help="of a denoiser on shapes of the preset one")
    parser.add_argument("--matcher", default="runs/matcher/matcher", help="directory of a matcher of the same shapes")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400, 800], help="of the checkpoints")
    parser.add_argument("--prompts", type=int, default=256, help="of each kind, held-out and seen (default: 256)")
    options = parser.parse_args()
    common.quieten()
    network, found = load_feature_network(options.matcher), {"held-out": [], "seen": []}
    number, denoising_steps = (16, 4) if options.quick else (options.prompts, 15)
    for step in options.steps:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = RunFolder(options.run).checkpoints_folder / checkpoint_name(step)
            export_run(DenoiserTraining, options.run, Path(folder) / "pipeline", checkpoint)
            pipeline = load_pipeline(Path(folder) / "pipeline")
        for kind, prompts_of in (("held-out", held_out_prompts), ("seen", seen_prompts)):
            prompts = prompts_of("one", number, 0)
            images = generate_from_captions(pipeline, prompts, 0, 64, num_inference_steps=denoising_steps, guidance_scale=3.0)
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
            vectors = network(pixels_to_images(pixels)), network.embed_texts(prompts)
            agreement = float(F.cosine_similarity(*vectors).mean())
            accuracy = shape_accuracy(images, prompts)["prompt_accuracy"]
            found[kind].append((accuracy, agreement))
            print(f"step {step}, {kind}: prompt accuracy {accuracy:.3f}, agreement {agreement:.4f}", flush=True)
    for kind, pairs in found.items():
        print(f"{kind}: rank correlation {float(spearman_corrcoef(*torch.tensor(pairs).T)):.2f}")


if __name__ == "__main__":
    main()
