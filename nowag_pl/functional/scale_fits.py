"""Least-squares fits of either vector of scales of a compressed weight `r2_i B_ij r1_j` to the linear's output.

Each lowers `sum_i e_i H e_i^T` over the rows e_i of `W - diag(r2) B diag(r1)`, H the mean of x x^T, with everything
else held fixed; B are codewords (NoWag-VQ, arXiv:2504.14569) or the numbers of a trellis between its rotations.
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Pulls r1 to its old value, as a share of the mean of the diagonal.
RIDGE = 1e-3


def fit_out_scale(
    weight: Float[Tensor, "out in"],
    direction: Float[Tensor, "out in"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, " out"]:
    """Return the best r2, `(v_i H w_i^T) / (v_i H v_i^T)` with `v_i = b_i diag(r1)`.

    Args:
        weight: dense weight W.
        direction: B.
        in_scale: r1.
        out_scale: r2; kept where v_i makes no output.
        second_moment: H.
    """
    scaled = direction * in_scale
    outputs = scaled @ second_moment
    power = (outputs * scaled).sum(dim=1)
    return torch.where(power > 0, (outputs * weight).sum(dim=1) / power, out_scale)


def fit_in_scale(
    weight: Float[Tensor, "out in"],
    direction: Float[Tensor, "out in"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, " in"]:
    """Return the best r1: the solution of `(V^T V * H) r1 = diag(V^T W H)` with `V = diag(r2) B`.

    Args:
        weight: dense weight W.
        direction: B.
        in_scale: r1, near which the solution stays where it makes no difference.
        out_scale: r2.
        second_moment: H.
    """
    scaled = direction * out_scale[:, None]
    matrix = ((scaled.T @ scaled) * second_moment).double()
    target = ((weight @ second_moment) * scaled).sum(dim=0, dtype=torch.float64)
    ridge = RIDGE * matrix.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(ridge.expand(len(matrix))))
    if failed:
        return in_scale
    residual = target - matrix @ in_scale.double()
    return in_scale + torch.cholesky_solve(residual[:, None], lower).squeeze(1).float()
