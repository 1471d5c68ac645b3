"""SparseGPT (arXiv:2301.00774): masks chosen block by block, with the kept weights making up for those removed so far.

It is error feedback with a projection in place of a quantizer: within a block of columns, whose mask is chosen by the
block's present weights, each column loses its removed weights, and all columns after it make up for them.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nowag_pl.functional.feedback import quantize_with_feedback
from nowag_pl.functional.moments import damped_inverse_factor
from nowag_pl.functional.pruning import keep_largest, keep_n_of_m

# Columns whose mask is chosen together, as in the paper.
MASK_BLOCK = 128


def prune_with_feedback(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    sparsity: float | None,
    pattern: tuple[int, int] | None,
    damping: float,
) -> tuple[Float[Tensor, "out in"], Bool[Tensor, "out in"]]:
    """Return the pruned weight, float32, and its mask.

    Args:
        weight: dense weight W.
        second_moment: H, mean of x x^T.
        sparsity: fraction to remove of each block of columns, over all of its rows; None with a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row; None without one.
        damping: addition to the diagonal of H, as a share of its mean.

    Raises:
        ValueError: H cannot be inverted.
    """
    factor = damped_inverse_factor(second_moment, damping)[1]
    masks = []

    def prune(columns: slice, target: Tensor, metric: Tensor) -> Tensor:
        own = factor[columns, columns]
        # The least increase of the output's error that removing each weight can cause, once later columns react.
        scores = (target / own.diagonal()).square()
        if pattern is not None:
            keep = keep_n_of_m(scores, pattern)
        else:
            assert sparsity is not None
            keep = keep_largest(scores.reshape(1, -1), sparsity).view(scores.shape)
        masks.append(keep)
        return quantize_with_feedback(target, own, 1, lambda column, values, _: values * keep[:, column])

    # The mask of a group is chosen when all columns before it have been pruned.
    width = MASK_BLOCK if pattern is None else pattern[1]
    pruned = quantize_with_feedback(weight.float(), factor, width, prune)
    return pruned, torch.cat(masks, dim=1)
