"""Least-squares fits of the two vectors of scales of any compressed weight `r2_i B_ij r1_j`, to the linear's output."""

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-3  # pulls r1 to where it was, as a share of the mean of the diagonal


def refit_scales(
    weight: Float[Tensor, "out in"],
    direction: Float[Tensor, "out in"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
    second_moment: Float[Tensor, "in in"],
) -> tuple[Float[Tensor, " in"], Float[Tensor, " out"]]:
    """Return the best r1 for r2, and then the best r2 for it.

    Each minimises `sum_i e_i H e_i^T` over the rows e_i of `W - diag(r2) B diag(r1)`: r1 solves
    `(V^T V * H) r1 = diag(V^T W H)` with `V = diag(r2) B`, and `r2_i = (v_i H w_i^T) / (v_i H v_i^T)` with
    `v_i = b_i diag(r1)`.

    Args:
        weight: dense weight W.
        direction: B.
        in_scale: r1, near which the solution stays where it makes no difference.
        out_scale: r2; kept where v_i makes no output.
        second_moment: H, mean of x x^T.
    """
    outputs = weight @ second_moment
    scaled = direction * out_scale[:, None]
    matrix = ((scaled.T @ scaled) * second_moment).double()
    residual = (outputs * scaled).sum(dim=0, dtype=torch.float64) - matrix @ in_scale.double()
    ridge = RIDGE * matrix.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(ridge.expand(len(matrix))))
    if not failed:
        in_scale = in_scale + torch.cholesky_solve(residual[:, None], lower).squeeze(1).float()
    scaled = direction * in_scale
    power = ((scaled @ second_moment) * scaled).sum(dim=1)
    return in_scale, torch.where(power > 0, (outputs * scaled).sum(dim=1) / power, out_scale)
