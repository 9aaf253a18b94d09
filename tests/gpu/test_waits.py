"""Both stages on a pretended GPU: nothing fails there, and how often a plain training step makes the host wait for it.

A plain step is one without a validation, a checkpoint or logging.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldm.machine import bf16_is_faster
from tests.gpu.launch import needs_pretended_gpu, on_pretended_gpu
from tests.tiny import TinyRuns

pytestmark = needs_pretended_gpu

MOST_WAITS = 0  # of a plain step

VARIANCE_PRESERVING = [
    "--model.path",
    "ldm.diffusion.path.VariancePreserving",
    "--model.prediction",
    "ldm.diffusion.prediction.V",
]
ALL_LOSSES = [
    *("--model.equivariance.probability", "1", "--model.adversary.lecam.weight", "0.1", "--model.learn_variance", "true"),
    *("--model.adversary.gradient_penalty.gamma", "1", "--model.adversary.gradient_penalty.every", "2"),
    *("--model.accumulate", "2", "--model.channels_last", "true", "--model.gradient_checkpointing", "true"),
    *("--model.fid_trunk", "alex-random"),
]


def waits_of_runs(counts: Any, folder: str, stage: str, out: str, runs: dict[str, list[str]]) -> dict[str, list[Any]]:
    """The waits of each plain step of runs with these options, one after the other."""
    from ldm.cli import main
    from tests.gpu.counting import between

    found = {}
    for name, options in runs.items():
        on_gpu = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed", "--trainer.log_every_n_steps", "50"]
        command = TinyRuns(Path(folder)).command(stage, f"{out}/{name}", *on_gpu, *options, steps=8, validate_every=4)
        main([*command[3:], "--trainer.callbacks+=tests.gpu.counting.CountSteps"])
        steps = [between(step - 1, step) for step in (4, 6, 7, 8)]
        for step in steps:  # an event is no wait if half a step of work has been launched since
            step.waits.update(f"event at {line}" for line, lag in step.lags if lag < step.launches.total() / 2)
        found[name] = [step.waits for step in steps]
    return found


def require(most: int, found: dict[str, list[dict[str, int]]]) -> None:
    """Fail, naming the lines, for a step that waits more often."""
    assert {name: steps for name, steps in found.items() if max(sum(waits.values()) for waits in steps) > most} == {}


def test_stage_two(tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path: Path) -> None:
    shards = f"{tiny_runs.folder}/shards"
    online = ["--data.train", shards, "--data.validation", shards, "--model.text_encoder", tiny_text_encoder]
    prior = ["--model.denoiser.init_args.micro_conditioning", "true", "--data.regularisation", f"{tiny_runs.folder}/latents"]
    runs = {"denoiser": [], "variance preserving": VARIANCE_PRESERVING, "online": [*online, "--model.online", "true"]}
    runs["sizes and weights"] = prior
    require(MOST_WAITS, on_pretended_gpu(waits_of_runs, str(tiny_runs.folder), "denoiser", str(tmp_path), runs))


def test_stage_one(tiny_runs: TinyRuns, tmp_path: Path) -> None:
    runs = {"autoencoder": [], "all losses": ALL_LOSSES}
    require(MOST_WAITS, on_pretended_gpu(waits_of_runs, str(tiny_runs.folder), "autoencoder", str(tmp_path), runs))


def test_a_budget_is_exceeded_by_one() -> None:
    require(2, {"run": [{"a": 1, "b": 1}]})
    with pytest.raises(AssertionError):
        require(2, {"run": [{"a": 1}, {"a": 2, "b": 1}]})


def commands(counts: Any, folder: str, text_encoder: str, out: str) -> dict[str, Any]:
    """Export, training and what uses the models on the GPU; then a training and an image on the CPU of the same machine."""
    from ldm.cli import main
    from ldm.files import read_yaml

    runs = TinyRuns(Path(folder))
    shards, autoencoder, text = f"{folder}/shards", f"{folder}/autoencoder", ["--text-encoder", text_encoder]
    main(["latents", "export", "--autoencoder", autoencoder, "--shards", shards, "--out", f"{out}/latents", *text])
    main(["latents", "decode", f"{out}/latents", f"{out}/decoded", "--autoencoder", autoencoder])
    main(["latents", "check", f"{out}/latents", "--autoencoder", autoencoder, "--shards", shards])
    main(["evaluate", "autoencoder", autoencoder, "--shards", shards])
    on_gpu = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]
    main(runs.command("denoiser", f"{out}/run", *on_gpu, steps=2)[3:])
    main(["denoiser", "export", f"{out}/run", f"{out}/pipeline"])
    for scheduler in ("euler", "heun", "unipc"):
        images = ["--steps", "3", "--scheduler", scheduler, "--out", f"{out}/{scheduler}"]
        main(["sample", f"{out}/pipeline", "a red ring", *images])
    launches, doubles = counts.launches.total(), dict(counts.doubles)
    for stage in ("autoencoder", "denoiser"):
        main(runs.command(stage, f"{out}/cpu-{stage}", steps=4)[3:])
    main(["sample", f"{out}/pipeline", "a red ring", "--device", "cpu", "--steps", "2", "--out", f"{out}/on-cpu"])
    config = read_yaml(Path(out, "cpu-denoiser/logs/config.yaml"), dict[str, Any])
    return {
        "launches on the GPU": launches,
        "launches on the CPU": counts.launches.total() - launches,
        "precision": config["trainer"]["precision"],
        "doubles": doubles,
    }


def test_commands_run_on_the_gpu_and_on_the_cpu_where_that_is_asked_for(
    tiny_runs: TinyRuns, tiny_text_encoder: str, tmp_path: Path
) -> None:
    found = on_pretended_gpu(commands, str(tiny_runs.folder), tiny_text_encoder, str(tmp_path))
    assert found["launches on the GPU"] > 1000
    assert found["launches on the CPU"] == 0
    assert found["precision"] == ("bf16-mixed" if bf16_is_faster("cpu") else "32-true")
    assert found["doubles"] == {}  # which MPS lacks
