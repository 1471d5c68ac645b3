"""A 2:4 linear that runs on sparse tensor cores."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nowag_pl.functional.bits import masked_bits_per_weight
from nowag_pl.functional.packing import unpack_keep
from nowag_pl.functional.semi_structured import PATTERN, semi_structured
from nowag_pl.modules.compressed_linear import CompressedLinear
from nowag_pl.modules.masked_linear import MaskedLinear


class SemiStructuredLinear(CompressedLinear):
    """A :class:`MaskedLinear` of pattern 2:4 for running only: it holds the form that the hardware multiplies.

    Description, state dict and storage are those of the masked linear, so that a model is saved as before. Loading into
    it is refused.

    Args:
        masked: the linear, for which :func:`~nowag_pl.functional.semi_structured.semi_structured_obstacle` finds none.
    """

    mask: Tensor
    semi_structured: Tensor

    def __init__(self, masked: MaskedLinear) -> None:
        super().__init__(masked.in_features, masked.out_features, masked.bias)
        self.requires_grad_(False).train(masked.training)
        self.dtype = masked.dtype
        self._bias_dtype = masked._bias_dtype
        self._masked_settings, self._stored_dtypes = masked.settings(), masked.stored_dtypes
        self.register_buffer("mask", masked.mask)
        self.register_buffer("semi_structured", semi_structured(masked.weight.to(masked.dtype)), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        return self.semi_structured.to_dense()

    @property
    def values(self) -> Tensor:
        """Kept weights, row-major, `[num_kept]`."""
        return self.weight[unpack_keep(self.mask, (self.out_features, self.in_features), PATTERN)]

    @property
    def bits_per_weight(self) -> float:
        """As stored; in memory a group of four takes four bits for its mask instead of three."""
        shape, num_kept = (self.out_features, self.in_features), self._masked_settings["num_kept"]
        return masked_bits_per_weight(shape, num_kept, self.dtype.itemsize * 8, PATTERN)

    @property
    def sparsity(self) -> float:
        """Half of the weights are removed."""
        return 0.5

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Those of the masked linear."""
        return dict(self._stored_dtypes)

    def settings(self) -> dict[str, Any]:
        """Return those of the masked linear."""
        return dict(self._masked_settings)

    def description(self) -> dict[str, Any]:
        """Return that of the masked linear, which is what is stored."""
        return {"class": MaskedLinear.__name__, **self.settings()}

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "SemiStructuredLinear":
        """Return a module with the right shapes; its mask keeps the first weights."""
        return cls(MaskedLinear.empty(settings))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}values"] = self.values

    def _load_from_state_dict(self, _: Mapping[str, Any], prefix: str, *__: Any) -> None:
        raise RuntimeError(
            f"Expected to load {prefix.rstrip('.')} before accelerate, but it is in its 2:4 form already."
        )

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the linear on sparse tensor cores; by the dense weight where activations are of another type.

        Args:
            activations: `[..., in]`.
        """
        if activations.dtype != self.dtype:
            return super().forward(activations)
        bias = None if self.bias is None else self.bias.to(activations.dtype)
        return F.linear(activations, self.semi_structured, bias)
