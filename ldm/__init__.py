"""ldm: train your own text-to-image model, from captioned images to a pipeline that opens in diffusers.

``import ldm`` makes the pipeline known to diffusers, so that ``DiffusionPipeline.from_pretrained`` opens a trained directory
without ``trust_remote_code``. It loads nothing else: torch and diffusers take seconds, which ``ldm --help`` need not wait for.
"""

import os
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.1.0"

# Read once, as torch loads GNU's OpenMP, whose idle threads by default spin for milliseconds on cores that others could
# use. A tenth of that costs a training step nothing, halves the time of a batch that is decoded between steps, and keeps a
# step beside a busy process from taking three times as long (two cores).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

_HOMES = {"DiT": "ldm.models.dit", "LatentDiffusionPipeline": "ldm.pipeline"}

__all__ = ["DiT", "LatentDiffusionPipeline"]


def __getattr__(name: str) -> type:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _introduce(diffusers: ModuleType) -> None:
    """``from_pretrained`` looks a pipeline's class up by name in the diffusers module: let it find ours there."""

    class Diffusers(type(diffusers)):
        def __getattr__(self, name: str) -> object:
            return __getattr__(name) if name == "LatentDiffusionPipeline" else super().__getattr__(name)

    diffusers.__class__ = Diffusers


class _WhenDiffusersComes(MetaPathFinder):
    """Waits for somebody to import diffusers."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "diffusers":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_introduce(module: ModuleType) -> None:
                execute(module)
                _introduce(sys.modules[name])  # where it has put a lazy module in its own place

            spec.loader.exec_module = execute_and_introduce
        return spec


if "diffusers" in sys.modules:
    _introduce(sys.modules["diffusers"])
else:
    sys.meta_path.insert(0, _WhenDiffusersComes())
