"""A linear `A S B`: an N:M sparse core between two block-diagonal factors (ARMOR, arXiv:2510.05528)."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.armor.block_diagonal import apply_factors
from nowag_pl.functional.armor.objective import ArmorFactors, reconstruct
from nowag_pl.functional.pruning import kept_values
from nowag_pl.functional.storage.bits import armor_bits_per_weight
from nowag_pl.functional.storage.packing import check_keep, pack_keep, pattern_bits, unpack_keep
from nowag_pl.modules.compressed.base import CompressedLinear, check_pattern, dtype_name, rounded_to

# For a wider weight: norms and normalised values need little range.
_STORED_DTYPE = torch.float16


class ArmorLinear(CompressedLinear):
    """A linear of two block-diagonal factors and the kept values of a core between them.

    All values are rounded to 16 bits, at the start and whenever they are stored: to the weight's type, or to float16
    if that is wider. They are held in the weight's type, as FSDP2 wants one type for all parameters of a module. The
    mask is in `ceil(log2(C(M, N)))` bits per group. Training can restore neither removed weights of the core nor
    entries outside the blocks.

    Args:
        factors: A with the row scales in it, S with its mask, B with the column scales in it.
        pattern: (N, M): exactly N of every M consecutive weights of a row of S are kept.
        bias: bias `[out]`, or None.
        dtype: type of the reconstructed weight.

    Raises:
        ValueError: the factors do not fit the core, the mask does not follow the pattern, or 16 bits do not hold a
            value.
    """

    mask: Tensor

    def __init__(
        self,
        factors: ArmorFactors,
        pattern: tuple[int, int],
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(factors.core.shape[1], factors.core.shape[0], bias)
        for name, blocks, size in (
            ("left", factors.out_factor, self.out_features),
            ("right", factors.in_factor, self.in_features),
        ):
            if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2] or blocks.shape[:2].numel() != size:
                raise ValueError(
                    f"Expected square blocks of the {name} factor with {size} rows in all, but got shape "
                    f"{tuple(blocks.shape)}."
                )
        values = [factors.out_factor, factors.in_factor, kept_values(factors.core, factors.keep)]
        self._hold([_round(each, dtype) for each in values], pack_keep(factors.keep, pattern), pattern, dtype)

    def _hold(self, values: Sequence[Tensor], mask: Tensor, pattern: tuple[int, int], dtype: torch.dtype) -> None:
        self.pattern = pattern
        self.dtype = dtype
        out_factor, in_factor, core_values = values
        self.out_factor = nn.Parameter(out_factor)  # [out / a, a, a]
        self.in_factor = nn.Parameter(in_factor)  # [in / b, b, b]
        self.values = nn.Parameter(core_values)  # [num_kept], row-major
        self.register_buffer("mask", mask)

    @property
    def keep(self) -> Tensor:
        """The mask of the core `[out, in]`, True where a value is kept."""
        return unpack_keep(self.mask, (self.out_features, self.in_features), self.pattern)

    @property
    def core(self) -> Tensor:
        """The core S `[out, in]` in float32, with zeros where values were removed."""
        keep = self.keep
        return torch.zeros(keep.shape, device=keep.device).masked_scatter_(keep, self.values.float())

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight `A S B`, `[out, in]`."""
        factors = ArmorFactors(self.out_factor.float(), self.core, self.keep, self.in_factor.float())
        return reconstruct(factors).to(self.dtype)

    def from_packed(self, activations: Tensor) -> Tensor:
        """Apply B, then the sparse core, then A.

        Args:
            activations: `[..., in]`.

        Returns:
            `[..., out]`, in the type of the activations.
        """
        dtype = activations.dtype
        output = apply_factors(activations, self.out_factor, self.core.to(dtype), self.in_factor)
        return output if self.bias is None else output + self.bias.to(dtype)

    @property
    def bits_per_weight(self) -> float:
        """Kept values, mask, and both factors."""
        shape = (self.out_features, self.in_features)
        return armor_bits_per_weight(shape, *self._block_sizes, self.pattern)

    @property
    def sparsity(self) -> float:
        """Fraction of the core that is removed; the weight `A S B` itself is dense."""
        return 1 - self.pattern[0] / self.pattern[1]

    @property
    def gradient_bytes(self) -> int:
        """The core in float32, its mask, and factors in 16 bits."""
        return round(5.5 * self.in_features * self.out_features)

    @property
    def restoring_bytes(self) -> int:
        """The core in float32, its mask, and the products with both factors."""
        return 32 * self.in_features * self.out_features

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Values and factors in 16 bits."""
        names = ("out_factor", "in_factor", "values")
        return {**super().stored_dtypes, **dict.fromkeys(names, _sixteen_bits(self.dtype))}

    @property
    def _block_sizes(self) -> tuple[int, int]:
        return self.out_factor.shape[1], self.in_factor.shape[1]

    def settings(self) -> dict[str, Any]:
        """Return shapes, block sizes, pattern and types."""
        out_block, in_block = self._block_sizes
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "out_block": out_block,
            "in_block": in_block,
            "pattern": list(self.pattern),
            "bias": self.bias_dtype,
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check sizes, types, pattern and blocks.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check_settings(settings)
        check_pattern(settings["pattern"], settings["in_features"])
        for side in ("out", "in"):
            if settings[f"{side}_features"] % settings[f"{side}_block"]:
                raise ValueError(
                    f"Expected {side}_block to divide {settings[f'{side}_features']}, but got "
                    f"{settings[f'{side}_block']}."
                )

    def check(self) -> None:
        """Check the factors, the kept values and the mask.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check()
        check_keep(self.mask, (self.out_features, self.in_features), len(self.values), self.pattern)

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "ArmorLinear":
        """Return a module with the right shapes and zeros for values and mask."""
        in_features, out_features = settings["in_features"], settings["out_features"]
        out_block, in_block, pattern = settings["out_block"], settings["in_block"], tuple(settings["pattern"])
        num_groups = out_features * in_features // pattern[1]
        shapes = (
            (out_features // out_block, out_block, out_block),
            (in_features // in_block, in_block, in_block),
            (num_groups * pattern[0],),
        )
        # Without a dense core and a mask that are to be replaced.
        linear = cls.__new__(cls)
        CompressedLinear.__init__(linear, in_features, out_features, cls.empty_bias(settings))
        mask = torch.zeros(ceil(num_groups * pattern_bits(pattern) / 8), dtype=torch.uint8)
        dtype = getattr(torch, settings["dtype"])
        linear._hold([torch.zeros(shape, dtype=dtype) for shape in shapes], mask, pattern, dtype)
        return linear


def _sixteen_bits(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which values of a weight of some type are stored."""
    return dtype if dtype.itemsize == _STORED_DTYPE.itemsize else _STORED_DTYPE


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values of a type that 16 bits hold exactly."""
    return rounded_to(values, _sixteen_bits(dtype), dtype, "factors and values")
