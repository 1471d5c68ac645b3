"""Compression methods: one linear in, one compressed module out."""

from nowag_pl.compressors.armor import ArmorCompressor
from nowag_pl.compressors.base import Compressor
from nowag_pl.compressors.baselines import MagnitudePruner, SparseGPTPruner, WandaPruner
from nowag_pl.compressors.nowag import NoWagPruner, NoWagQuantizer
from nowag_pl.compressors.trellis import NoWagTrellis

__all__ = [
    "ArmorCompressor",
    "Compressor",
    "MagnitudePruner",
    "NoWagPruner",
    "NoWagQuantizer",
    "NoWagTrellis",
    "SparseGPTPruner",
    "WandaPruner",
]
