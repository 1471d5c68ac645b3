"""LoRA (arXiv:2106.09685) over compressed linears, by PEFT (the extra `lora`)."""

from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from nowag_pl.modules import CompressedLinear

_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")  # those that leave the base weight as it is


class LoraCompressedLinear(LoraLinear):
    """A compressed linear plus the product of two small matrices, `scaling * B A x`.

    Raises:
        ValueError: the adapter would start by changing the base weights, which compressed linears do not allow.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **settings: Any) -> None:
        _check_start(config)
        super().__init__(base_layer, adapter_name, config=config, **settings)

    def _get_in_out_features(self, module: CompressedLinear) -> tuple[int, int]:  # type: ignore[override]
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the sum of a compressed weight and a low-rank one is dense.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Expected a dense model to merge an adapter into, but got a compressed one: a merged weight is not "
            "compressed any more. Keep the adapter beside it, or load the adapter over model.dequantize()."
        )


def lora_for_compressed(config: LoraConfig) -> LoraConfig:
    """Check that a LoRA configuration suits compressed linears.

    Where nowag_pl was imported, PEFT does so itself when it puts the adapter over the model; this says it earlier.

    Args:
        config: names its `target_modules`; "all-linear" finds ordinary linears only.

    Returns:
        The same object.

    Raises:
        ValueError: the adapter would start by changing the base weights, which compressed linears do not allow.
    """
    _check_start(config)
    register(config)
    return config


def register(config: LoraConfig) -> None:
    """Name the layer over compressed linears in a configuration; it is not stored with an adapter."""
    config._register_custom_module({CompressedLinear: LoraCompressedLinear})


def _check_start(config: LoraConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"Expected a LoraConfig, but got {type(config).__name__}.")
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise ValueError(
            f"Expected init_lora_weights to be one of {_INITIALIZATIONS} over compressed linears, but got "
            f"{config.init_lora_weights!r}, which changes the base weights."
        )
