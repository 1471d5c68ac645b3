"""Pruning baselines: magnitude, and Wanda (arXiv:2306.11695)."""

from dataclasses import dataclass

from torch import Tensor

from nowag_pl.compressors.pruner import Pruner
from nowag_pl.functional.pruning import keep_largest, wanda_scores


@dataclass(frozen=True)
class MagnitudePruner(Pruner):
    """Keep the largest `|W_ij|` of the matrix, or of each group of an N:M pattern.

    Args:
        sparsity: fraction of the weights to remove, in [0, 1). null: 0.5, unless there is a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
    """

    def scores(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """Return the absolute weights, `[out, in]`."""
        return weight.abs().float()


@dataclass(frozen=True)
class WandaPruner(Pruner):
    """Keep the largest `|W_ij| sqrt(h_j)` of each row, or of each group of an N:M pattern.

    Args:
        sparsity: fraction of each row to remove, in [0, 1). null: 0.5, unless there is a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
    """

    def scores(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """Return Wanda's importance, `[out, in]`."""
        return wanda_scores(weight, second_moment)

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask `[out, in]`; without a pattern, scores are compared within each row."""
        if self.pattern is not None:
            return super().keep(scores)
        assert self.sparsity is not None
        return keep_largest(scores, self.sparsity)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Return the number of kept weights of a linear `(out, in)`; without a pattern, the same number in each row."""
        return super().num_kept(shape) if self.pattern is not None else shape[0] * super().num_kept((1, shape[1]))
