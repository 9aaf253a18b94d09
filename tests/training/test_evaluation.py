"""Metrics in training: those of the exported pipeline, whatever stops the run, and training does not notice them."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ldm.cli import main
from ldm.errors import UsageError
from ldm.evaluation.image_sets import Scorer
from ldm.runs.layout import RunFolder, step_of
from ldm.training.evaluation import Evaluate, Evaluation
from tests.tiny import TinyRuns

TRAINER = {"val_check_interval": 2, "limit_val_batches": 1.0, "max_steps": 8}


def rows(run: RunFolder) -> list[dict[str, float]]:
    found = csv.DictReader(run.metrics.open())
    return [{name: float(row[name]) for name in row if row[name] and not name.startswith("time/")} for row in found]


def state(run: RunFolder) -> dict[str, Any]:
    """Weights, and the random numbers that training would use next."""
    checkpoint = torch.load(run.last_checkpoint, weights_only=True)
    return {**checkpoint["state_dict"], "random": checkpoint["random"][0]["torch"]}


@pytest.mark.usefixtures("restored_signals")
def test_metrics_are_those_of_the_exported_pipeline_and_training_does_not_notice_them(
    tiny_runs: TinyRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plain, stopped = (RunFolder(tmp_path / name) for name in ("whole", "plain", "stopped"))
    # a best checkpoint by a metric that the first validations do not have
    every = [*tiny_runs.evaluation(), "--trainer.val_check_interval", "2", "--checkpoints.best", "val/fid_alex_random"]
    every += ["--model.preview_prompts", "null"]
    main(tiny_runs.command("denoiser", whole.path, *every)[3:])
    record = json.loads((whole.path / "evaluations/step-00000008.json").read_text())
    command = ["evaluate", "pipeline", f"{whole.path}/pipeline", "--shards", f"{tiny_runs.folder}/shards"]
    command += ["--network", "alex-random", "--count", "12", "--steps", "2", "--batch-size", "5"]
    main([*command, "--json", f"{tmp_path}/out.json"])
    of_pipeline = json.loads((tmp_path / "out.json").read_text())
    assert record["metrics"] == of_pipeline["metrics"] and record["protocol"]["step"] == 8
    same = of_pipeline["protocol"].keys() - {"model", "model_hash", "dtype", "ldm", "device"}
    assert {name: record["protocol"][name] for name in same} == {name: of_pipeline["protocol"][name] for name in same}
    logged = {name.removeprefix("val/"): value for name, value in rows(whole)[-1].items() if name.endswith("_alex_random")}
    assert logged == pytest.approx({name: metric["value"] for name, metric in record["metrics"].items()})
    assert [row["step"] for row in rows(whole) if "val/fid_alex_random" in row] == [3, 7]

    fids = [row["val/fid_alex_random"] for row in rows(whole) if "val/fid_alex_random" in row]
    assert step_of(whole.best_checkpoint.resolve()) == 4 * (1 + fids.index(min(fids)))

    main(tiny_runs.command("denoiser", plain.path)[3:])
    torch.testing.assert_close(state(plain), state(whole), rtol=0, atol=0)

    generate = Scorer.generated_images

    def asked_to_stop(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*given, **named)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as leave:
        patched.setattr(Scorer, "generated_images", asked_to_stop)
        main(tiny_runs.command("denoiser", stopped.path, *every)[3:])
    assert leave.value.code == 143 and not (stopped.path / "evaluations").exists()
    main(tiny_runs.command("denoiser", stopped.path, *every, "--resume", "latest")[3:])
    assert rows(stopped) == rows(whole)
    torch.testing.assert_close(state(stopped), state(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "trainer", "said"),
    [
        ({}, {"val_check_interval": 3}, "every 4 steps, validation every 3; give a multiple"),
        ({"every": 12}, {}, "every 12 steps, but the run has 8"),
        ({}, {"limit_val_batches": 0}, "part of validations, but the run has none"),
        ({"networks": ["clop"]}, {}, "the feature network clop does not exist"),
        ({"metrics": ["fid", "clipscore"]}, {}, "clipscore needs a network and a model of images and text"),
        ({"metrics": ["mse"]}, {}, "no metric mse; give some of fid, kid"),
        ({"batch_size": 0}, {}, "batch_size of the evaluation is 0"),
        ({"shards": "latents"}, {}, "ldm-image-shards are needed"),
        ({"count": 25}, {}, "of 25 images, but"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_first_step(
    tiny_runs: TinyRuns, settings: dict[str, Any], trainer: dict[str, Any], said: str
) -> None:
    given = TRAINER | trainer | {"strategy": SimpleNamespace(root_device=torch.device("cpu"))}
    encoders = SimpleNamespace(text_encoders=[SimpleNamespace(is_unconditional=False)])
    settings = json.loads(tiny_runs.evaluation(**settings)[1]) | settings
    with pytest.raises(UsageError, match=said):
        settings["shards"] = str(tiny_runs.folder / Path(settings["shards"]).name)
        Evaluate(Evaluation(**settings)).on_fit_start(
            *cast(Any, (SimpleNamespace(**given), SimpleNamespace(encoders=encoders)))
        )
