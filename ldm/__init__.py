"""ldm: train your own text-to-image model, from captioned images to a pipeline that opens in diffusers.

``import ldm`` makes the pipeline and the DiT known to diffusers, so that ``DiffusionPipeline.from_pretrained`` opens a
trained directory without ``trust_remote_code``.
"""

import os
import sys

__version__ = "0.1.0"

# Read once, as torch loads GNU's OpenMP, whose idle threads by default spin for milliseconds on cores that others could
# use. A tenth of that costs a training step nothing, halves the time of a batch that is decoded between steps, and keeps a
# step beside a busy process from taking three times as long (two cores).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

try:
    import diffusers

    from ldm.models.dit import DiT
    from ldm.pipeline import LatentDiffusionPipeline
except Exception:
    if sys.argv[1:2] != ["doctor"]:  # which says what is wrong with such an installation
        raise
else:
    # from_pretrained looks the pipeline's class up by name in the diffusers module
    diffusers.LatentDiffusionPipeline = LatentDiffusionPipeline

__all__ = ["DiT", "LatentDiffusionPipeline"]
