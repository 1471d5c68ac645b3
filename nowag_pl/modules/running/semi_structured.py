"""Linears with a 2:4 matrix that run on sparse tensor cores."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nowag_pl.functional.armor.block_diagonal import apply_factors, multiply_left, multiply_right
from nowag_pl.functional.storage.packing import unpack_keep
from nowag_pl.functional.storage.semi_structured import PATTERN, semi_structured
from nowag_pl.modules.compressed.armor import ArmorLinear
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.running.base import RunningLinear


class SemiStructuredBase(RunningLinear):
    """A linear for inference only that holds its 2:4 matrix in the form that sparse tensor cores multiply.

    In memory a group of four takes four bits for its mask instead of three.

    Args:
        linear: the linear, for which
            :func:`~nowag_pl.functional.storage.semi_structured.reason_against_semi_structured` finds none.
        matrix: its 2:4 matrix `[out, in]`.
    """

    mask: Tensor
    semi_structured: Tensor

    def __init__(self, linear: MaskedLinear | ArmorLinear, matrix: Tensor) -> None:
        super().__init__(linear)
        self.dtype = linear.dtype
        self.register_buffer("mask", linear.mask)
        self.register_buffer("semi_structured", semi_structured(matrix.to(linear.dtype)), persistent=False)

    def stored_state(self) -> dict[str, Tensor]:
        """Return the kept values, row-major, `[num_kept]`."""
        keep = unpack_keep(self.mask, (self.out_features, self.in_features), PATTERN)
        return {"values": self.semi_structured.to_dense()[keep]}

    @property
    def held_bytes(self) -> int:
        """Bytes in memory; the semi-structured tensor hides its own: half of the values, and two bits for each."""
        hidden = self.out_features * self.in_features * self.dtype.itemsize * 9 // 16
        return hidden + self.mask.nbytes + sum(parameter.nbytes for parameter in self.parameters())

    def matrix_for(self, dtype: torch.dtype) -> Tensor:
        """Return the 2:4 matrix for activations of a type; it is dense if that is not its own."""
        return self.semi_structured if dtype == self.dtype else self.semi_structured.to_dense().to(dtype)


class SemiStructuredLinear(SemiStructuredBase):
    """A :class:`MaskedLinear` of pattern 2:4 on sparse tensor cores.

    Args:
        masked: the linear.
    """

    def __init__(self, masked: MaskedLinear) -> None:
        super().__init__(masked, masked.weight)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        return self.semi_structured.to_dense()

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "SemiStructuredLinear":
        """Return a module with the right shapes; its mask keeps the first weights."""
        return cls(MaskedLinear.empty(settings))

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the linear on sparse tensor cores, or by the dense weight if activations have another type.

        Args:
            activations: `[..., in]`.
        """
        bias = None if self.bias is None else self.bias.to(activations.dtype)
        return F.linear(activations, self.matrix_for(activations.dtype), bias)


class SemiStructuredArmorLinear(SemiStructuredBase):
    """An :class:`ArmorLinear` whose 2:4 core is on sparse tensor cores, between its block-diagonal factors.

    Args:
        armor: the linear.
    """

    def __init__(self, armor: ArmorLinear) -> None:
        super().__init__(armor, armor.core)
        self.out_factor = nn.Parameter(armor.out_factor.detach(), requires_grad=False)  # [out / a, a, a]
        self.in_factor = nn.Parameter(armor.in_factor.detach(), requires_grad=False)  # [in / b, b, b]

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight `A S B`, `[out, in]`."""
        left = multiply_left(self.out_factor.float(), self.semi_structured.to_dense().float())
        return multiply_right(left, self.in_factor.float()).to(self.dtype)

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "SemiStructuredArmorLinear":
        """Return a module with the right shapes; its mask keeps the first values."""
        return cls(ArmorLinear.empty(settings))

    def forward(self, activations: Tensor) -> Tensor:
        """Apply B, the core on sparse tensor cores, and A; the core is dense if activations have another type.

        Args:
            activations: `[..., in]`.
        """
        dtype = activations.dtype
        output = apply_factors(activations, self.out_factor, self.matrix_for(dtype), self.in_factor)
        return output if self.bias is None else output + self.bias.to(dtype)
