"""Compress Llama-family language models: normalised pruning and vector quantization, under PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nowag_pl.models.format.registration import install as _install

if TYPE_CHECKING:
    from nowag_pl.compressors import (
        ArmorCompressor,
        MagnitudePruner,
        NoWagPruner,
        NoWagQuantizer,
        NoWagTrellis,
        SparseGPTPruner,
        WandaPruner,
    )
    from nowag_pl.models.format.saving import load_compressed, save_compressed, save_dense
    from nowag_pl.models.peft import lora_for_compressed
    from nowag_pl.modules import SecondMoment, accelerate

__version__ = "0.1.0"

_HOMES = {
    "ArmorCompressor": "nowag_pl.compressors",
    "MagnitudePruner": "nowag_pl.compressors",
    "NoWagPruner": "nowag_pl.compressors",
    "NoWagQuantizer": "nowag_pl.compressors",
    "NoWagTrellis": "nowag_pl.compressors",
    "SecondMoment": "nowag_pl.modules",
    "SparseGPTPruner": "nowag_pl.compressors",
    "WandaPruner": "nowag_pl.compressors",
    "accelerate": "nowag_pl.modules",
    "load_compressed": "nowag_pl.models.format.saving",
    "lora_for_compressed": "nowag_pl.models.peft",
    "save_compressed": "nowag_pl.models.format.saving",
    "save_dense": "nowag_pl.models.format.saving",
}
__all__ = [
    "ArmorCompressor",
    "MagnitudePruner",
    "NoWagPruner",
    "NoWagQuantizer",
    "NoWagTrellis",
    "SecondMoment",
    "SparseGPTPruner",
    "WandaPruner",
    "accelerate",
    "load_compressed",
    "lora_for_compressed",
    "save_compressed",
    "save_dense",
]

_install()  # so that AutoModelForCausalLM knows compressed models


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import nowag_pl` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
