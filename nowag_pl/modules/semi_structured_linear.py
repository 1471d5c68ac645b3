"""A 2:4 linear that runs on sparse tensor cores."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nowag_pl.functional.packing import unpack_keep
from nowag_pl.functional.semi_structured import PATTERN, semi_structured
from nowag_pl.modules.masked_linear import MaskedLinear
from nowag_pl.modules.running_form import RunningForm


class SemiStructuredLinear(RunningForm):
    """A :class:`MaskedLinear` of pattern 2:4 for running only: it holds the form that sparse tensor cores multiply.

    In memory a group of four takes four bits for its mask instead of three.

    Args:
        masked: the linear, for which :func:`~nowag_pl.functional.semi_structured.semi_structured_obstacle` finds none.
    """

    mask: Tensor
    semi_structured: Tensor

    def __init__(self, masked: MaskedLinear) -> None:
        super().__init__(masked)
        self.dtype = masked.dtype
        self.register_buffer("mask", masked.mask)
        self.register_buffer("semi_structured", semi_structured(masked.weight.to(masked.dtype)), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        return self.semi_structured.to_dense()

    def stored_state(self) -> dict[str, Tensor]:
        """Return the kept weights, row-major, `[num_kept]`."""
        return {"values": self.weight[unpack_keep(self.mask, (self.out_features, self.in_features), PATTERN)]}

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "SemiStructuredLinear":
        """Return a module with the right shapes; its mask keeps the first weights."""
        return cls(MaskedLinear.empty(settings))

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the linear on sparse tensor cores; by the dense weight where activations are of another type.

        Args:
            activations: `[..., in]`.
        """
        if activations.dtype != self.dtype:
            return super().forward(activations)
        bias = None if self.bias is None else self.bias.to(activations.dtype)
        return F.linear(activations, self.semi_structured, bias)
