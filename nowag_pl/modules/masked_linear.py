"""A pruned linear: the kept weights and a mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.bits import masked_bits_per_weight
from nowag_pl.functional.packing import pack_keep, unpack_keep
from nowag_pl.modules.compressed_linear import CompressedLinear, dtype_name


class MaskedLinear(CompressedLinear):
    """A linear that has values only where weights were kept; training cannot bring the others back.

    The mask is held in packed bytes: one bit per weight, or `ceil(log2(C(M, N)))` bits per group of an N:M pattern.

    Args:
        weight: dense weight `[out, in]`; the values that stay are taken as they are.
        keep: mask `[out, in]`, True where a weight is kept.
        bias: bias `[out]`, or None.
        pattern: (N, M) if exactly N of every M consecutive weights of a row are kept.

    Raises:
        ValueError: the mask has another shape than the weight, or does not follow the pattern.
    """

    mask: Tensor

    def __init__(
        self,
        weight: Tensor,
        keep: Tensor,
        bias: Tensor | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        if keep.shape != weight.shape:
            raise ValueError(f"Expected a mask of shape {tuple(weight.shape)}, but got {tuple(keep.shape)}.")
        self.pattern = pattern
        self.dtype = weight.dtype
        self.values = nn.Parameter(weight.detach()[keep])  # [num_kept], row-major
        self.register_buffer("mask", pack_keep(keep, pattern))

    @property
    def keep(self) -> Tensor:
        """The mask `[out, in]`, True where a weight is kept."""
        return unpack_keep(self.mask, (self.out_features, self.in_features), self.pattern)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        keep = self.keep
        return self.values.new_zeros(keep.shape).masked_scatter(keep, self.values)

    @property
    def bits_per_weight(self) -> float:
        """Kept values in their own type, and the mask."""
        shape = (self.out_features, self.in_features)
        return masked_bits_per_weight(shape, len(self.values), self.dtype.itemsize * 8, self.pattern)

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are removed."""
        return 1 - len(self.values) / (self.out_features * self.in_features)

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Kept values in the type of the weight they come from."""
        return {**super().stored_dtypes, "values": self.dtype}

    def settings(self) -> dict[str, Any]:
        """Return shapes, pattern and type."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "num_kept": len(self.values),
            "pattern": None if self.pattern is None else list(self.pattern),
            "bias": self.bias_dtype,
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "MaskedLinear":
        """Return a module with the right shapes; its mask keeps the first weights."""
        shape, dtype = (settings["out_features"], settings["in_features"]), getattr(torch, settings["dtype"])
        pattern = None if settings["pattern"] is None else tuple(settings["pattern"])
        group_size, num_kept = (shape[0] * shape[1], settings["num_kept"])
        if pattern is not None:
            num_kept, group_size = pattern
        keep = torch.zeros(shape, dtype=torch.bool).view(-1, group_size)
        keep[:, :num_kept] = True
        return cls(torch.zeros(shape, dtype=dtype), keep.view(shape), cls.empty_bias(settings), pattern)
