"""Parts of the diffusion are chosen in YAML: each choice trains, is previewed with its guidance rule, and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ldm.cli import main
from ldm.diffusion.guidance import AdaptiveProjected, ClassifierFree, Interval, Rescale
from ldm.pipeline import LatentDiffusionPipeline
from tests.tiny import write_config

CHOICES = {
    "vp": """
        path:
          class_path: ldm.diffusion.path.VariancePreserving
          init_args: {schedule: squaredcos_cap_v2, zero_terminal_snr: true}
        prediction: {class_path: ldm.diffusion.prediction.V}
        timesteps: {class_path: ldm.diffusion.timesteps.DiscreteUniform}
        weighting: {class_path: ldm.diffusion.weighting.MinSNR, init_args: {gamma: 5.0}}
        preview_guidance:
          class_path: ldm.diffusion.guidance.Interval
          init_args:
            low: 0.2
            high: 0.9
            inner:
              class_path: ldm.diffusion.guidance.Rescale
              init_args: {amount: 0.5, inner: {class_path: ldm.diffusion.guidance.ClassifierFree, init_args: {scale: 4.0}}}
        """,
    "ddpm": """
        path: {class_path: ldm.diffusion.path.VariancePreserving, init_args: {schedule: linear}}
        prediction: {class_path: ldm.diffusion.prediction.Epsilon}
        timesteps: {class_path: ldm.diffusion.timesteps.Uniform}
        preview_guidance: 1.5
        """,
    "edm": """
        path: {class_path: ldm.diffusion.path.VarianceExploding, init_args: {sigma_max: 40.0}}
        prediction: {class_path: ldm.diffusion.prediction.Preconditioned}
        timesteps: {class_path: ldm.diffusion.timesteps.LogNormal, init_args: {location: -0.5}}
        weighting: {class_path: ldm.diffusion.weighting.EDM}
        preview_guidance: {class_path: ldm.diffusion.guidance.AdaptiveProjected, init_args: {scale: 3.0}}
        """,
    "flow": """
        path: {class_path: ldm.diffusion.path.RectifiedFlow}
        prediction: {class_path: ldm.diffusion.prediction.Velocity}
        timesteps: {class_path: ldm.diffusion.timesteps.Mode, init_args: {shift: 3.0}}
        auxiliary_losses: [{class_path: ldm.losses.auxiliary.DirectionLoss, init_args: {weight: 0.5}}]
        preview_guidance: {class_path: ldm.diffusion.guidance.ZeroStar, init_args: {scale: 3.0, zero_init_steps: 1}}
        """,
}
RULES = {
    "vp": Interval(Rescale(ClassifierFree(4.0), 0.5), 0.2, 0.9),
    "ddpm": ClassifierFree(1.5),
    "edm": AdaptiveProjected(3.0),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_in_yaml_trains_and_samples(
    latents: tuple[Path, Path], tmp_path: Path, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = yaml.safe_load(CHOICES[choice]) | {"preview_prompts": ["a red ring"], "preview_steps": 3}
    config = write_config(tmp_path / "config.yaml", latents, {"max_steps": 2, "val_check_interval": 2}, **model)
    rules = []
    generate = LatentDiffusionPipeline.__call__

    def record(*arguments: Any, **named: Any) -> Any:
        rules.append(named.get("guidance"))
        return generate(*arguments, **named)

    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", record)
    main(["denoiser", "fit", "--config", str(config), "--out", str(tmp_path / "run")])
    assert len(rules) == 2 and (choice not in RULES or rules[0] == RULES[choice])
    assert Image.open(tmp_path / "run/previews/step-00000002.png").size[0] > 0
    main(["sample", str(tmp_path / "run/pipeline"), "a red ring", "--out", str(tmp_path / "images"), "--steps", "3"])
    assert list((tmp_path / "images").glob("0000-*.png"))
