"""Modules: running statistics and compressed linears."""

from nowag_pl.modules.acceleration import accelerate
from nowag_pl.modules.armor_linear import ArmorLinear
from nowag_pl.modules.compressed_linear import CompressedLinear
from nowag_pl.modules.cross_moment import CrossMoment
from nowag_pl.modules.lookup_linear import LookupLinear
from nowag_pl.modules.masked_linear import MaskedLinear
from nowag_pl.modules.second_moment import SecondMoment
from nowag_pl.modules.semi_structured_linear import SemiStructuredArmorLinear, SemiStructuredLinear
from nowag_pl.modules.vq_linear import VQLinear

__all__ = [
    "ArmorLinear",
    "CompressedLinear",
    "CrossMoment",
    "LookupLinear",
    "MaskedLinear",
    "SecondMoment",
    "SemiStructuredArmorLinear",
    "SemiStructuredLinear",
    "VQLinear",
    "accelerate",
]
