"""Peak FLOP/s of NVIDIA's GPUs for dense products that are summed in fp32, by the names that their driver gives them.

Data sheets of tensor cores print twice as much, "with sparsity", and architecture papers of GeForce cards also a rate of fp16
summed in fp16, which no training uses. Lightning's table (2.6) takes either for some cards.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Peaks(NamedTuple):
    """In TFLOP/s; ``bf16`` is None for a GPU without it, and ``tf32`` is the rate of fp32 for one without TF32."""

    bf16: float | None
    tf32: float
    fp32: float


def _of_fp32(bf16: int, tf32: int, **fp32: float) -> dict[str, Peaks]:
    """GPUs whose other rates are these multiples of the given fp32 rate; ``_`` in a name stands for a space."""
    return {name.replace("_", " "): Peaks(bf16 * rate, tf32 * rate, rate) for name, rate in fp32.items()}


PEAKS = {
    # NVIDIA Blackwell Datasheet (HGX B200, GB200 NVL72)
    "b200": Peaks(2250, 1125, 75),
    "gb200": Peaks(2500, 1250, 80),
    # NVIDIA H100, H200, GH200 and H20 Tensor Core GPU Datasheets
    "h200": Peaks(989.5, 494.5, 67),
    "h200 nvl": Peaks(835.5, 417.5, 60),
    **dict.fromkeys(("gh200", "gh200 hbm3e"), Peaks(989.5, 494.5, 67)),
    "h100 hbm3": Peaks(989.5, 494.5, 67),
    "h100 nvl": Peaks(835.5, 417.5, 60),
    "h100 pcie": Peaks(756, 378, 51),
    "h20": Peaks(148, 74, 44),
    # NVIDIA A100, A30, A40, A10 and A10G (AWS) Tensor Core GPU Datasheets
    **dict.fromkeys(("a100 sxm4", "a100 pcie"), Peaks(312, 156, 19.5)),
    "a30": Peaks(165, 82, 10.3),
    "a40": Peaks(149.7, 74.8, 37.4),
    "a10": Peaks(125, 62.5, 31.2),
    "a10g": Peaks(70, 35, 35),
    # NVIDIA L4, L40 and L40S Tensor Core GPU Datasheets
    "l4": Peaks(121, 60, 30.3),
    "l40": Peaks(181, 90.5, 90.5),
    "l40s": Peaks(362, 183, 91.6),
    # data sheets of the workstation cards: NVIDIA Ampere GA102 whitepaper 2.0, appendix C, and NVIDIA Ada whitepaper (RTX 6000)
    **_of_fp32(4, 2, rtx_a6000=38.7, rtx_a5000=27.8, rtx_a4500=23.7, rtx_a4000=19.2),
    **_of_fp32(4, 2, rtx_6000_ada_generation=91.1, rtx_5000_ada_generation=65.3, rtx_4500_ada_generation=39.6),
    **_of_fp32(4, 2, rtx_4000_ada_generation=26.7, rtx_pro_6000_blackwell_workstation_edition=126),
    # GeForce sums tensor products in fp32 at half the rate of the same chip on a workstation card: NVIDIA Ampere GA102 2.0,
    # Ada 2.1 and RTX Blackwell 1.1 whitepapers, appendices
    **_of_fp32(2, 1, rtx_3090_ti=40, rtx_3090=35.6, rtx_3080_ti=34.1, rtx_3080=29.8, rtx_3070=20.3),
    **_of_fp32(2, 1, rtx_4090=82.6, rtx_4080_super=52.2, rtx_4080=48.7, rtx_4070_ti_super=44.1, rtx_4070_ti=40.1),
    **_of_fp32(2, 1, rtx_4070_super=35.5, rtx_4070=29.1, rtx_4060_ti=22.1),
    **_of_fp32(2, 1, rtx_5090=104.8, rtx_5080=56.3, rtx_5070_ti=43.9, rtx_5070=30.9),
    # NVIDIA V100 and T4 Tensor Core GPU Datasheets; NVIDIA Turing whitepaper: no bf16
    "v100 sxm2": Peaks(None, 15.7, 15.7),
    "v100 pcie": Peaks(None, 14, 14),
    "v100s pcie": Peaks(None, 16.4, 16.4),
    "t4": Peaks(None, 8.1, 8.1),
    "rtx 2080 ti": Peaks(None, 13.4, 13.4),
}


def peaks_of(device_name: str) -> Peaks | None:
    """Of a GPU that the driver calls so; None for one that is not listed, such as a laptop's or a part of one (MIG)."""
    name = re.sub(r"\b(nvidia|tesla|geforce|\d+gb?)\b", " ", device_name.lower().replace("-", " "))
    return PEAKS.get(" ".join(name.split()))
