"""The layer-wise objective of NoWag (arXiv:2504.14569): activation-weighted error of the normalised weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.chunks import row_chunks
from nowag_pl.functional.normalization import normalize_rows, norms


def normalized_loss(
    weight: Float[Tensor, "out in"],
    reconstruction: Float[Tensor, "out in"],
    second_moment: Float[Tensor, " in"],
) -> float:
    """Return `sum_ij h_j (W_bar_ij - W_bar_hat_ij)^2` divided by its value at `W_bar_hat = 0`.

    Args:
        weight: normalised weight W_bar.
        reconstruction: compressed normalised weight W_bar_hat.
        second_moment: h, mean of the squared input of each column.

    Returns:
        0 for an exact reconstruction, 1 for nothing kept; 0 where the weight itself counts for nothing.

    Example:
        >>> import torch
        >>> normalized_loss(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([3.0, 1.0]))
        0.25
    """
    total = _weighted_sum_of_squares(weight, second_moment)
    return _weighted_sum_of_squares(weight - reconstruction, second_moment) / total if total else 0.0


def reconstruction_loss(
    weight: Float[Tensor, "out in"],
    reconstruction: Float[Tensor, "out in"],
    second_moment: Float[Tensor, " in"],
) -> float:
    """Return :func:`normalized_loss` of matrices that are not normalised, a chunk of rows in memory at a time.

    Args:
        weight: weight W, by whose norms both are normalised.
        reconstruction: compressed weight W_hat.
        second_moment: h, mean of the squared input of each column.
    """
    in_scale, out_scale = norms(weight)
    error = total = 0.0
    for rows in row_chunks(*weight.shape):
        dense = normalize_rows(weight[rows], in_scale, out_scale[rows])
        error += _weighted_sum_of_squares(
            dense - normalize_rows(reconstruction[rows], in_scale, out_scale[rows]), second_moment
        )
        total += _weighted_sum_of_squares(dense, second_moment)
    return error / total if total else 0.0


def output_weights(
    in_scale: Float[Tensor, " in"], out_scale: Float[Tensor, " out"], second_moment: Float[Tensor, " in"]
) -> tuple[Float[Tensor, " out"], Float[Tensor, " in"]]:
    """Return weights of rows and of columns that let errors of the normalised weight count as errors of the output.

    With `v = r2^2` and `u = h r1^2`, `sum_ij v_i u_j (W_bar_ij - W_bar_hat_ij)^2` is the mean squared error of the
    outputs where inputs do not correlate, up to a factor: both weights have mean 1.

    Args:
        in_scale: r1.
        out_scale: r2.
        second_moment: h, mean of the squared input of each column.
    """
    return with_mean_one(out_scale.square()), with_mean_one(second_moment * in_scale.square())


def with_mean_one(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Return values divided by their mean; all zeros are not changed.

    Args:
        values: not negative.
    """
    return values / values.mean().clamp(min=torch.finfo(values.dtype).tiny)


def _weighted_sum_of_squares(matrix: Tensor, column_weights: Tensor) -> float:
    columns = matrix.detach().float().square().sum(dim=0, dtype=torch.float64)  # [in]
    return float(columns @ column_weights.double())
