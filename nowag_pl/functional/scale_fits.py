"""Least-squares fits of either vector of scales of a compressed weight `r2_i B_ij r1_j` to the linear's output.

Each lowers `sum_i e_i H e_i^T` over the rows e_i of `E = W - diag(r2) B diag(r1)`, H the mean of x x^T, with everything
else held fixed; or `tr(H_O E H E^T)`, where the final loss couples the outputs. B are codewords (NoWag-VQ,
arXiv:2504.14569) or the numbers of a trellis between its rotations.
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
    output_moment: Float[Tensor, "out out"] | None = None,
) -> Float[Tensor, " out"]:
    """Return the best r2, `(v_i H w_i^T) / (v_i H v_i^T)` with `v_i = b_i diag(r1)`.

    With H_O, the solution of `(V H V^T * H_O) r2 = diag(V H W^T H_O)`.

    Args:
        weight: dense weight W.
        direction: B.
        in_scale: r1.
        out_scale: r2; kept where v_i makes no output.
        second_moment: H.
        output_moment: H_O; None for the identity.
    """
    scaled = direction * in_scale
    outputs = scaled @ second_moment
    if output_moment is not None:
        matrix = ((outputs @ scaled.T) * output_moment).double()
        return _nearest(matrix, (outputs * (output_moment @ weight)).sum(dim=1, dtype=torch.float64), out_scale)
    power = (outputs * scaled).sum(dim=1)
    return torch.where(power > 0, (outputs * weight).sum(dim=1) / power, out_scale)


def fit_in_scale(
    weight: Float[Tensor, "out in"],
    direction: Float[Tensor, "out in"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
    second_moment: Float[Tensor, "in in"],
    output_moment: Float[Tensor, "out out"] | None = None,
) -> Float[Tensor, " in"]:
    """Return the best r1: the solution of `(V^T V * H) r1 = diag(V^T W H)` with `V = diag(r2) B`.

    With H_O, `V^T` becomes `V^T H_O`.

    Args:
        weight: dense weight W.
        direction: B.
        in_scale: r1, near which the solution stays where it makes no difference.
        out_scale: r2.
        second_moment: H.
        output_moment: H_O; None for the identity.
    """
    scaled = direction * out_scale[:, None]
    seen = scaled if output_moment is None else output_moment @ scaled
    matrix = ((scaled.T @ seen) * second_moment).double()
    return _nearest(matrix, ((weight @ second_moment) * seen).sum(dim=0, dtype=torch.float64), in_scale)


def _nearest(matrix: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """Return the solution of a symmetric system that stays near a start where it makes no difference."""
    ridge = RIDGE * matrix.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(ridge.expand(len(matrix))))
    if failed:
        return start
    residual = target - matrix @ start.double()
    return start + torch.cholesky_solve(residual[:, None], lower).squeeze(1).float()
