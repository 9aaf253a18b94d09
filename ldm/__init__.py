"""ldm: train your own text-to-image model, from captioned images to a pipeline that opens in diffusers.

``import ldm`` makes the pipeline known to diffusers, so that ``DiffusionPipeline.from_pretrained`` opens a trained directory
without ``trust_remote_code``. It loads nothing else: torch and diffusers take seconds, which ``ldm --help`` need not wait for.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

TYPE_CHECKING = False  # as of typing; until ldm.__main__ handles Ctrl-C there should be few imports
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from ldm.models.dit import DiT
    from ldm.pipeline import LatentDiffusionPipeline

__version__ = "0.1.0"

# GNU's OpenMP reads this once, when torch loads it. By default its idle threads spin for milliseconds on cores that data
# loading needs. With a tenth of that, training steps are as fast, decoding a batch between steps takes half the time, and a
# step beside a busy process no longer takes three times as long (measured on two cores).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

_MODULES = {"DiT": "ldm.models.dit", "LatentDiffusionPipeline": "ldm.pipeline"}

__all__ = ["DiT", "LatentDiffusionPipeline"]


def __getattr__(name: str) -> type:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _register(diffusers: ModuleType) -> None:
    """``from_pretrained`` looks up a pipeline's class by name in the diffusers module: make ours available there."""

    class Diffusers(type(diffusers)):
        def __getattr__(self, name: str) -> object:
            return __getattr__(name) if name == "LatentDiffusionPipeline" else super().__getattr__(name)

    diffusers.__class__ = Diffusers


class _DiffusersFinder:
    """Registers our pipeline as soon as diffusers is imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(sys.modules[name])  # diffusers replaces itself by a lazy module while it is executed

            spec.loader.exec_module = execute_and_register
        return spec


if "diffusers" in sys.modules:
    _register(sys.modules["diffusers"])
else:
    sys.meta_path.insert(0, _DiffusersFinder())
