"""ARMOR (arXiv:2510.05528): a 2:4 core between two block-diagonal factors."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import Compressor, check_inputs, empty_settings
from nowag_pl.functional.armor.block_diagonal import largest_block
from nowag_pl.functional.armor.fit import ArmorSettings, Schedule, Selection, fit_armor
from nowag_pl.functional.armor.groups import supports_of
from nowag_pl.functional.armor.objective import ArmorTarget, identity_factors
from nowag_pl.functional.normalization import Normalized, normalize
from nowag_pl.functional.objective import output_weights, with_mean_one
from nowag_pl.functional.patterns import as_pattern, check_row
from nowag_pl.functional.pruning import keep_n_of_m, nowag_scores
from nowag_pl.functional.ranges import check_real, check_whole
from nowag_pl.modules import ArmorLinear


@dataclass(frozen=True)
class ArmorCompressor(Compressor):
    """ARMOR: `A S B` for the normalised weight, fitted from NoWag-P's N:M result by block coordinate descent.

    Args:
        pattern: (N, M): the core S keeps N of every M consecutive weights of a row.
        block_size: largest size of the blocks of A and B, or one size for each, such as [64, 128]; the largest divisor
            of the number of features up to this is used (for B, a multiple of M). A and B cost
            16 (block of A / in + block of B / out) bits per weight.
        max_iters: largest number of iterations, each a step of Adam and a choice of supports.
        learning_rate: first learning rate of Adam on A and B. The rate of S is scaled by the size of its values.
        schedule: "cosine" for a rate that falls to zero over max_iters, which is best for some hundred iterations;
            "constant" for ten thousand and more, with a small rate.
        tolerance: stop when a tenth of max_iters lowers the loss by less than this fraction.
        selection: choice of the group in each pair of blocks that may get a new support: "gradient", with a probability
            proportional to the squared gradient of the loss, or "random".
        weighting: weight of an error of the normalised weight. "normalized": the paper's `h_j`; "output": its effect on
            the linear's output, `h_j r1_j^2 r2_i^2`.
        seed: seed of the choice of groups.
    """

    pattern: tuple[int, int] = (2, 4)
    block_size: int | tuple[int, int] = 128
    max_iters: int = 500
    learning_rate: float = 2e-2
    schedule: Schedule = "cosine"
    tolerance: float = 1e-3
    selection: Selection = "gradient"
    weighting: Literal["normalized", "output"] = "normalized"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: the pattern is no (N, M) or has too many supports, or another setting is out of its range.
        """
        object.__setattr__(self, "pattern", as_pattern(self.pattern))
        supports_of(self.pattern)
        if isinstance(self.block_size, (list, tuple)):
            object.__setattr__(self, "block_size", tuple(self.block_size))
            check_whole("number of sizes in block_size", len(self.block_size), 2, 2)
        for size in self._largest_blocks:
            check_whole("block_size", size, self.pattern[1])
        check_whole("max_iters", self.max_iters, 0)
        check_whole("seed", self.seed, 0)
        check_real("learning_rate", self.learning_rate)
        check_real("tolerance", self.tolerance)
        words = {"selection": ("gradient", "random"), "schedule": ("cosine", "constant")}
        for name, choices in (words | {"weighting": ("normalized", "output")}).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} to be one of {choices}, but got {getattr(self, name)!r}.")

    @property
    def _largest_blocks(self) -> tuple[int, int]:
        """Largest size of the blocks of A and of B."""
        return self.block_size if isinstance(self.block_size, tuple) else (self.block_size, self.block_size)

    def block_sizes(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the size of the blocks of A and of B for a linear `(out, in)`.

        Raises:
            ValueError: M does not divide the input features.
        """
        check_row(shape[1], self.pattern)
        of_out, of_in = self._largest_blocks
        return (largest_block(shape[0], of_out), largest_block(shape[1], of_in, multiple_of=self.pattern[1]))

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> ArmorLinear:
        """Return the fitted linear without values; see :class:`~nowag_pl.compressors.base.Compressor`."""
        out_block, in_block = self.block_sizes(shape)
        own = {"out_block": out_block, "in_block": in_block, "pattern": self.pattern}
        with torch.device("meta"):
            return ArmorLinear.empty({**empty_settings(shape, dtype, bias), **own})

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Return the memory of factors, gradients, Adam's moments, residuals and products, in bytes."""
        return 64 * shape[0] * shape[1]

    @torch.no_grad()
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> ArmorLinear:
        """Fit one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_inputs(linear, second_moment)
        sizes = self.block_sizes((linear.out_features, linear.in_features))
        normalized = normalize(linear.weight)
        second_moment = second_moment.to(linear.weight.device)
        keep = keep_n_of_m(nowag_scores(normalized.weight, second_moment), self.pattern)
        settings = ArmorSettings(
            self.pattern, self.max_iters, self.learning_rate, self.tolerance, self.selection, self.schedule
        )
        generator = torch.Generator().manual_seed(self.seed)
        start = identity_factors(normalized.weight, keep, *sizes)
        fit = fit_armor(self._target(normalized, second_moment), start, settings, generator)
        out_factor, in_factor = fit.factors.out_factor, fit.factors.in_factor
        scaled = fit.factors._replace(
            out_factor=out_factor * normalized.out_scale.view(*out_factor.shape[:2], 1),
            in_factor=in_factor * normalized.in_scale.view(len(in_factor), 1, -1),
        )
        return ArmorLinear(scaled, self.pattern, linear.bias, linear.weight.dtype)

    def _target(self, normalized: Normalized, second_moment: Tensor) -> ArmorTarget:
        """Return the objective; weights average 1, so that gradients are large compared with Adam's epsilon."""
        weight, in_scale, out_scale = normalized
        if self.weighting == "output":
            return ArmorTarget(weight, *output_weights(in_scale, out_scale, second_moment))
        return ArmorTarget(weight, torch.ones_like(out_scale), with_mean_one(second_moment))
