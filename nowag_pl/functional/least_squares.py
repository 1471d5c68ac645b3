"""Least-squares fits by conjugate gradients, with the diagonal as preconditioner.

They start from where the values are, so that no number of steps can make the error larger. The values fitted here are
the kept weights of a pruned linear, to the output of the dense one; :mod:`nowag_pl.functional.vq.refit` fits codebooks.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


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
    return conjugate_gradients(
        kept,
        residual,
        lambda step: torch.where(keep, step @ second_moment, 0),
        second_moment.diagonal().expand_as(kept),
        lambda left, right: (left * right).sum(dim=1, keepdim=True),
        num_steps,
    )


def conjugate_gradients(
    start: Float[Tensor, "*shape"],
    residual: Float[Tensor, "*shape"],
    apply: Callable[[Tensor], Tensor],
    diagonal: Float[Tensor, "*shape"],
    dot: Callable[[Tensor, Tensor], Tensor],
    num_steps: int,
) -> Float[Tensor, "*shape"]:
    """Solve one positive semidefinite system, or one for each row, by the scalar product `dot`.

    Args:
        start: first solution.
        residual: right-hand side less the product of the matrix and the first solution.
        apply: multiplies by the matrix.
        diagonal: diagonal of the matrix, in the shape of the solution; values at its zeros do not move.
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
