"""ldm: train your own text-to-image model, from captioned images to a pipeline that opens in diffusers.

``import ldm`` makes the pipeline and the DiT known to diffusers, so that ``DiffusionPipeline.from_pretrained`` opens a
trained directory without ``trust_remote_code``.
"""

import diffusers

from ldm.models.dit import DiT
from ldm.pipeline import LatentDiffusionPipeline

__version__ = "0.1.0"
__all__ = ["DiT", "LatentDiffusionPipeline"]

# from_pretrained looks the pipeline's class up by name in the diffusers module
diffusers.LatentDiffusionPipeline = LatentDiffusionPipeline
