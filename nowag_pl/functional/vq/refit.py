"""Least-squares fits of what a compressed weight is made of, to the output of the dense linear.

Each lowers `sum_i (w_i - q_i) H (w_i - q_i)^T`, H the mean of x x^T, over one part of the reconstruction q with the
rest held fixed: scales and codebook of `q_i = r2_i codebook[codes_i] r1` (NoWag-VQ, arXiv:2504.14569), or the kept
weights of a pruned row. Codebook and kept weights are fitted by conjugate gradients with the diagonal as
preconditioner, from where they are: no step can make the error larger.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CODEBOOK_STEPS = 10
SCALE_RIDGE = 1e-3  # pulls r1 to where it was, as a share of the mean of the diagonal


def refit_out_scale(
    weight: Float[Tensor, "out in"],
    codebook: Float[Tensor, "k d"],
    codes: Int[Tensor, "out groups"],
    in_scale: Float[Tensor, "in"],
    out_scale: Float[Tensor, "out"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, "out"]:
    """Return the best r2, `(v_i H w_i^T) / (v_i H v_i^T)` with `v_i = codebook[codes_i] r1`.

    Args:
        weight: dense weight W.
        codebook: codewords.
        codes: codeword of each subvector.
        in_scale: r1.
        out_scale: r2; kept where v_i makes no output.
        second_moment: H, mean of x x^T.
    """
    direction = codebook[codes].flatten(1)[:, : len(in_scale)] * in_scale
    outputs = direction @ second_moment
    power = (outputs * direction).sum(dim=1)
    return torch.where(power > 0, (outputs * weight).sum(dim=1) / power, out_scale)


def refit_in_scale(
    weight: Float[Tensor, "out in"],
    codebook: Float[Tensor, "k d"],
    codes: Int[Tensor, "out groups"],
    in_scale: Float[Tensor, "in"],
    out_scale: Float[Tensor, "out"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, "in"]:
    """Return the best r1: the solution of `(V^T V * H) r1 = diag(V^T W H)` with `V = r2 codebook[codes]`.

    Args:
        weight: dense weight W.
        codebook: codewords.
        codes: codeword of each subvector.
        in_scale: r1, near which the solution stays where it makes no difference.
        out_scale: r2.
        second_moment: H, mean of x x^T.
    """
    direction = codebook[codes].flatten(1)[:, : len(in_scale)] * out_scale[:, None]
    matrix = ((direction.T @ direction) * second_moment).double()
    target = ((weight @ second_moment) * direction).sum(dim=0, dtype=torch.float64)
    ridge = SCALE_RIDGE * matrix.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(matrix + torch.diag(ridge.expand(len(matrix))))
    if failed:
        return in_scale
    residual = target - matrix @ in_scale.double()
    return in_scale + torch.cholesky_solve(residual[:, None], lower).squeeze(1).float()


def refit_codebook(
    weight: Float[Tensor, "out in"],
    codebook: Float[Tensor, "k d"],
    codes: Int[Tensor, "out groups"],
    in_scale: Float[Tensor, "in"],
    out_scale: Float[Tensor, "out"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, "k d"]:
    """Return a codebook with less output error, by a few steps of conjugate gradients.

    Args:
        weight: dense weight W.
        codebook: codewords to start from. Those that no subvector uses stay.
        codes: codeword of each subvector.
        in_scale: r1.
        out_scale: r2.
        second_moment: H, mean of x x^T.
    """
    dim, num_features = codebook.shape[1], weight.shape[1]
    padding = codes.shape[1] * dim - num_features

    def expand(codewords: Tensor) -> Tensor:  # [k, d] to [out, in]
        return codewords[codes].flatten(1)[:, :num_features] * in_scale * out_scale[:, None]

    def collect(matrix: Tensor) -> Tensor:  # the transpose of it
        parts = torch.nn.functional.pad(matrix, (0, padding)).view(-1, dim)
        return torch.zeros_like(codebook).index_add_(0, codes.flatten(), parts)

    scales = in_scale * out_scale[:, None]
    diagonal = collect(second_moment.diagonal() * scales.square())
    residual = collect(((weight - expand(codebook)) @ second_moment) * scales)
    return _conjugate_gradients(
        codebook,
        residual,
        lambda step: collect((expand(step) @ second_moment) * scales),
        diagonal,
        lambda left, right: (left * right).sum(),
        CODEBOOK_STEPS,
    )


def refit_kept(
    weight: Float[Tensor, "out in"],
    keep: Bool[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    num_steps: int,
) -> Float[Tensor, "out in"]:
    """Return the kept weights of each row that come closest to the output of the whole row; all others are zero.

    Args:
        weight: dense weight W.
        keep: True where a weight is kept.
        second_moment: H, mean of x x^T.
        num_steps: steps of conjugate gradients, from the kept weights of W.
    """
    kept = torch.where(keep, weight.float(), 0)
    residual = torch.where(keep, (weight.float() - kept) @ second_moment, 0)
    return _conjugate_gradients(
        kept,
        residual,
        lambda step: torch.where(keep, step @ second_moment, 0),
        second_moment.diagonal().expand_as(kept),
        lambda left, right: (left * right).sum(dim=1, keepdim=True),
        num_steps,
    )


def _conjugate_gradients(
    start: Tensor,
    residual: Tensor,
    apply: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    dot: Callable[[Tensor, Tensor], Tensor],
    num_steps: int,
) -> Tensor:
    """Solve one positive semidefinite system, or one for each row, as `dot` says.

    Args:
        start: first solution.
        residual: right-hand side less what the first solution gives.
        apply: multiplies by the matrix.
        diagonal: of the matrix, in the shape of the solution; what has 0 there does not move.
        dot: scalar products, in a shape that broadcasts with the solution.
        num_steps: steps.
    """
    scale = torch.where(diagonal > 0, 1 / diagonal, 0)
    solution, direction = start, scale * residual
    power = dot(residual, direction)
    for _ in range(num_steps):
        image = apply(direction)
        curvature = dot(direction, image)
        length = torch.where((curvature > 0) & (power > 0), power / curvature, 0)
        solution = solution + length * direction
        residual = residual - length * image
        scaled = scale * residual
        previous, power = power, dot(residual, scaled)
        direction = scaled + torch.where(previous > 0, power / previous, 0) * direction
    return solution
