"""What the pruning methods share: settings, checks, and the module that they make."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import check_inputs
from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.pruning import (
    check_pattern,
    check_row,
    check_sparsity,
    keep_largest,
    keep_n_of_m,
)
from nowag_pl.functional.storage.bits import masked_bits_per_weight
from nowag_pl.modules import MaskedLinear

DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Pruner(ABC):
    """Remove the weights with the smallest scores.

    Args:
        sparsity: fraction of the weights to remove, in [0, 1). null: 0.5, unless a pattern says it.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    working_bytes_per_weight: ClassVar[float] = 8  # scores in float32, the mask, intermediate results
    gradient_bytes_per_weight: ClassVar[float] = 5  # the weight in float32, the mask

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: sparsity is outside of [0, 1), the pattern is no (N, M), or both are given.
        """
        if self.pattern is not None:
            object.__setattr__(self, "pattern", tuple(self.pattern))
            check_pattern(self.pattern)
            if self.sparsity is not None:
                raise ValueError(
                    f"Expected sparsity or pattern, but got sparsity {self.sparsity} and pattern {self.pattern}. "
                    "The pattern says how much is removed: set sparsity to null."
                )
        elif self.sparsity is None:
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY)
        if self.sparsity is not None:
            check_sparsity(self.sparsity)

    @torch.no_grad()
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> nn.Module:
        """Prune one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_inputs(linear, second_moment)
        keep = self.keep(self.scores(linear.weight, mean_squares(second_moment).to(linear.weight.device)))
        return MaskedLinear(linear.weight, keep, linear.bias, self.pattern)

    def expected_bits_per_weight(self, shape: tuple[int, int], value_bits: int) -> float:
        """Return the storage of a pruned linear; see :class:`~nowag_pl.compressors.base.Foreseeing`."""
        if self.pattern is not None:
            check_row(shape[1], self.pattern)
        return masked_bits_per_weight(shape, self.num_kept(shape), value_bits, self.pattern)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Return how many weights of a linear `(out, in)` stay."""
        num_weights = shape[0] * shape[1]
        if self.pattern is not None:
            return num_weights // self.pattern[1] * self.pattern[0]
        assert self.sparsity is not None
        return num_weights - round(self.sparsity * num_weights)

    def num_values(self, shape: tuple[int, int]) -> int:
        """Return how many values of a pruned linear `(out, in)` can be trained."""
        return self.num_kept(shape)

    def alternatives(self) -> list[dict[str, Any]]:
        """Return other sparsities, up to 0.3 away; see :class:`~nowag_pl.compressors.base.Varying`."""
        if self.sparsity is None:
            return []  # a pattern
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
