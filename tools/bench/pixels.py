"""Pixels against latents at equal seconds: the quickstart, then ``configs/shapes/pixels.yaml`` as long as its two stages took.

Both learn the same shapes and are scored on the same held-out prompts. The seconds of the quickstart are those of both ``fit``
commands; encoding its latents is not counted, nor is the export of pixels.

    python tools/bench/pixels.py --out pixels-bench
"""

from __future__ import annotations

from pathlib import Path

import common  # first
import yaml

from ldm.cli import dispatch
from ldm.evaluation.prompts import generate_from_captions, shape_accuracy
from ldm.files import read_json
from ldm.pipeline import load_pipeline
from ldm.quickstart import CALIBRATION_STEPS, SAMPLING, quickstart
from ldm.shapes.scenes import held_out_prompts


def main() -> None:
    """Train both and print their accuracies, then the ratio: pixels over latents."""
    parser = common.bench_parser(__doc__, "a quickstart of a few steps: shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("pixels-bench"), help="a new folder, or that of an interrupted run")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the quickstart (default: 10)")
    options = parser.parse_args()
    latents, minutes = options.out / "quickstart", 0.05 if options.quick else options.minutes
    quickstart(latents, minutes, 0, dispatch)
    report = read_json(latents / "report.json")
    seconds = sum(report["seconds"][f"train the {stage}"] for stage in ("autoencoder", "denoiser"))
    for name in ("shards", "shards-validation"):
        if not (options.out / name / "manifest.json").exists():
            export = ["latents", "export", "--autoencoder", "identity", "--shards", str(latents / name)]
            dispatch([*export, "--out", str(options.out / name)])
    pipeline = options.out / "pipeline"
    if not pipeline.exists():
        steps = max(round(seconds / seconds_per_step(options.out)), 1)
        print(f"{seconds:.0f} s: {report['steps']} steps on latents, {steps} on pixels", flush=True)
        fit(options.out, options.out / "run", steps, "--export", str(pipeline), "--resume", "latest")
    prompts = held_out_prompts("one", report["prompts"], 0)
    found = shape_accuracy(generate_from_captions(load_pipeline(pipeline), prompts, 0, 64, **SAMPLING), prompts)
    for name, value in found.items():
        print(f"{name}: {report['held_out'][name]:.3f} latents, {value:.3f} pixels")
    common.print_ratios({"pixels_prompt_accuracy": [found["prompt_accuracy"] / max(report["prompt_accuracy"], 1e-9)]})


def fit(folder: Path, out: Path, steps: int, *more: str) -> None:
    """Train the recipe for so many steps on the pixels in ``folder``."""
    data = ["--data.train", str(folder / "shards"), "--data.validation", str(folder / "shards-validation")]
    length = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(max(steps // 4, 1))]
    recipe = str(common.CONFIGS / "shapes" / "pixels.yaml")
    dispatch(["denoiser", "fit", "--config", recipe, "--out", str(out), *data, *length, *more])


def seconds_per_step(folder: Path) -> float:
    """From a short trial of the same command."""
    timing = {"class_path": "ldm.runs.callbacks.StepTimes", "init_args": {"file": str(folder / "seconds.json")}}
    callbacks = folder / "trial.yaml"
    callbacks.write_text(yaml.safe_dump({"trainer": {"callbacks": [timing]}}))
    if not (folder / "seconds.json").exists():
        fit(folder, folder / "trial", CALIBRATION_STEPS, "--config", str(callbacks), "--model.preview_prompts", "[]")
    return read_json(folder / "seconds.json")["seconds_per_step"]


if __name__ == "__main__":
    main()
