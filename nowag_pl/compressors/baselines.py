"""Pruning baselines: magnitude, Wanda (arXiv:2306.11695), and SparseGPT (arXiv:2301.00774)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import check_inputs
from nowag_pl.compressors.pruner import Pruner
from nowag_pl.functional.pruning import keep_largest, wanda_scores
from nowag_pl.functional.sparsegpt import MASK_BLOCK, prune_with_feedback
from nowag_pl.modules import MaskedLinear


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


@dataclass(frozen=True)
class SparseGPTPruner(Pruner):
    """SparseGPT: columns are pruned one after the other, and those that follow make up for the removed weights.

    Args:
        sparsity: fraction to remove of every 128 columns, in [0, 1). null: 0.5, unless there is a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
        damping: addition to the diagonal of the second moments, as a share of its mean.
    """

    damping: float = 0.01

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: as :class:`~nowag_pl.compressors.pruner.Pruner`, or damping is not positive.
        """
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(f"Expected damping greater than 0, but got {self.damping}.")

    @property
    def full_second_moment(self) -> bool:
        """Whether the matrix of x x^T is needed."""
        return True

    @torch.no_grad()
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> MaskedLinear:
        """Prune one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_inputs(linear, second_moment, full=True)
        moment = second_moment.to(linear.weight.device)
        pruned, keep = prune_with_feedback(linear.weight, moment, self.sparsity, self.pattern, self.damping)
        return MaskedLinear(pruned.to(linear.weight.dtype), keep, linear.bias, self.pattern)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Return the number of kept weights of a linear `(out, in)`; without a pattern, the same in all blocks."""
        if self.pattern is not None:
            return super().num_kept(shape)
        whole, rest = divmod(shape[1], MASK_BLOCK)
        return whole * super().num_kept((shape[0], MASK_BLOCK)) + super().num_kept((shape[0], rest))

    def scores(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """Return the importance of each weight before any is removed, `[out, in]`, by the diagonal of the moments."""
        return wanda_scores(weight, second_moment)
