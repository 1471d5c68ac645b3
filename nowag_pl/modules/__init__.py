"""Modules: running statistics and compressed linears."""

from nowag_pl.modules.compressed.armor import ArmorLinear
from nowag_pl.modules.compressed.base import CompressedLinear
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.compressed.trellis import TrellisLinear
from nowag_pl.modules.compressed.vq import VQLinear
from nowag_pl.modules.moments import CrossMoment, SecondMoment
from nowag_pl.modules.running.acceleration import accelerate
from nowag_pl.modules.running.dense import DenseLinear
from nowag_pl.modules.running.lookup import LookupLinear
from nowag_pl.modules.running.semi_structured import SemiStructuredArmorLinear, SemiStructuredLinear

__all__ = [
    "ArmorLinear",
    "CompressedLinear",
    "CrossMoment",
    "DenseLinear",
    "LookupLinear",
    "MaskedLinear",
    "SecondMoment",
    "SemiStructuredArmorLinear",
    "SemiStructuredLinear",
    "TrellisLinear",
    "VQLinear",
    "accelerate",
]
