"""The base of the pruning methods: settings, checks, and the resulting module."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import Compressor, check_inputs, empty_settings
from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.patterns import as_pattern, check_row
from nowag_pl.functional.pruning import check_sparsity, keep_largest, keep_n_of_m
from nowag_pl.modules import MaskedLinear

DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Pruner(Compressor):
    """Remove the weights with the smallest scores.

    Args:
        sparsity: fraction of the weights to remove, in [0, 1). null: 0.5, unless there is a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: sparsity is outside of [0, 1), the pattern is no (N, M), or both are given.
        """
        if self.pattern is not None:
            object.__setattr__(self, "pattern", as_pattern(self.pattern))
            if self.sparsity is not None:
                raise ValueError(
                    f"Expected sparsity or pattern, but got sparsity {self.sparsity} and pattern {self.pattern}. "
                    "The pattern determines the sparsity: set sparsity to null."
                )
        elif self.sparsity is None:
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)

    @torch.no_grad()
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> MaskedLinear:
        """Prune one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_inputs(linear, second_moment)
        keep = self.keep(self.scores(linear.weight, mean_squares(second_moment).to(linear.weight.device)))
        return MaskedLinear(linear.weight, keep, linear.bias, self.pattern)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> MaskedLinear:
        """Return the pruned linear without values; see :class:`~nowag_pl.compressors.base.Compressor`."""
        if self.pattern is not None:
            check_row(shape[1], self.pattern)
        own = {"num_kept": self.num_kept(shape), "pattern": self.pattern}
        with torch.device("meta"):
            return MaskedLinear.empty({**empty_settings(shape, dtype, bias), **own})

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Return the memory of scores in float32, the mask and intermediate results, in bytes."""
        return 8 * shape[0] * shape[1] + self.full_moment_bytes(shape)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Return the number of weights of a linear `(out, in)` that are kept."""
        num_weights = shape[0] * shape[1]
        if self.pattern is not None:
            return num_weights // self.pattern[1] * self.pattern[0]
        assert self.sparsity is not None
        return num_weights - round(self.sparsity * num_weights)

    def alternatives(self) -> list[dict[str, Any]]:
        """Return other sparsities, up to 0.3 away, in steps of 0.1."""
        if self.sparsity is None:
            # A pattern.
            return []
        others = (round(self.sparsity + step / 10, 6) for step in (-3, -2, -1, 1, 2, 3))
        return [{"sparsity": sparsity} for sparsity in others if 0 <= sparsity < 1]

    @abstractmethod
    def scores(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """Return the importance of each weight, `[out, in]`."""

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask `[out, in]`; without a pattern, scores are compared over the whole matrix."""
        if self.pattern is not None:
            return keep_n_of_m(scores, self.pattern)
        assert self.sparsity is not None
        return keep_largest(scores.reshape(1, -1), self.sparsity).view(scores.shape)
