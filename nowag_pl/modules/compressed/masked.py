"""A pruned linear: the kept weights and a mask."""

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.pruning import kept_values
from nowag_pl.functional.storage.bits import masked_bits_per_weight
from nowag_pl.functional.storage.packing import check_keep, pack_keep, pattern_bits, unpack_keep
from nowag_pl.modules.compressed.base import CompressedLinear, check_pattern, dtype_name


class MaskedLinear(CompressedLinear):
    """A linear that has values only where weights were kept; training cannot restore the others.

    The mask is held in packed bytes: one bit per weight, or `ceil(log2(C(M, N)))` bits per group of an N:M pattern.

    Args:
        weight: dense weight `[out, in]`; kept weights keep their values.
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
        self._hold(kept_values(weight.detach(), keep), pack_keep(keep, pattern), pattern)

    def _hold(self, values: Tensor, mask: Tensor, pattern: tuple[int, int] | None) -> None:
        self.pattern = pattern
        self.dtype = values.dtype
        self.values = nn.Parameter(values)  # [num_kept], row-major
        self.register_buffer("mask", mask)

    @property
    def keep(self) -> Tensor:
        """The mask `[out, in]`, True where a weight is kept."""
        return unpack_keep(self.mask, (self.out_features, self.in_features), self.pattern)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        keep = self.keep
        return self.values.new_zeros(keep.shape).masked_scatter_(keep, self.values)

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
    def gradient_bytes(self) -> int:
        """The weight in float32, and the mask."""
        return 5 * self.in_features * self.out_features

    @property
    def restoring_bytes(self) -> int:
        """The mask, and intermediate results."""
        return 4 * self.in_features * self.out_features

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
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check sizes, types and pattern.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check_settings(settings)
        pattern, num_kept = settings["pattern"], settings["num_kept"]
        count = settings["in_features"] * settings["out_features"]
        least, most = 0, count
        if pattern is not None:
            check_pattern(pattern, settings["in_features"])
            least = most = count // pattern[1] * pattern[0]
        if type(num_kept) is not int or not least <= num_kept <= most:
            raise ValueError(f"Expected num_kept in [{least}, {most}], but got {num_kept!r}.")

    def check(self) -> None:
        """Check the kept values and the mask.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check()
        check_keep(self.mask, (self.out_features, self.in_features), len(self.values), self.pattern)

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "MaskedLinear":
        """Return a module with the right shapes and zeros for values and mask."""
        in_features, out_features = settings["in_features"], settings["out_features"]
        pattern = None if settings["pattern"] is None else tuple(settings["pattern"])
        num_bits = out_features * in_features
        if pattern is not None:
            num_bits = num_bits // pattern[1] * pattern_bits(pattern)
        # Without packing a mask that is to be replaced.
        linear = cls.__new__(cls)
        CompressedLinear.__init__(linear, in_features, out_features, cls.empty_bias(settings))
        values = torch.zeros(settings["num_kept"], dtype=getattr(torch, settings["dtype"]))
        linear._hold(values, torch.zeros(ceil(num_bits / 8), dtype=torch.uint8), pattern)
        return linear
