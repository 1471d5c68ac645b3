"""Alternating directions (ADMM): a compressed form chosen together with the values that go with it.

The problem is to find a weight D that has a compressed form and the least output error,
`sum_i (w_i - d_i) H (w_i - d_i)^T`, H the mean of x x^T. ADMM keeps a dense weight X in addition and alternates between
lowering the error of X near D, and projecting X onto the compressed form; a growing penalty brings both together. For
masks this is ALPS (arXiv:2406.07831), here with columns scaled to a unit diagonal of H.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Project = Callable[[Tensor], Tensor]
"""Returns the nearest weight `[out, in]` of the compressed form, with column j weighted by `H_jj`."""


@dataclass(frozen=True)
class Alternation:
    """How long directions alternate, and how fast both weights are brought together.

    Attributes:
        num_steps: alternations.
        growth: factor by which the penalty grows with each step.
        penalty: penalty at the start, for a unit diagonal of H.
    """

    num_steps: int
    growth: float
    penalty: float = 0.1


KEEP = Alternation(num_steps=30, growth=1.1)


def alternate(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    project: Project,
    settings: Alternation,
) -> Float[Tensor, "out in"]:
    """Run ADMM and return X, the dense weight that was projected last.

    Args:
        weight: dense weight W, float32.
        second_moment: H, mean of x x^T, positive definite.
        project: projection onto the compressed form.
        settings: steps and penalties.
    """
    scale = second_moment.diagonal().sqrt()  # [in]
    unit = second_moment / scale / scale[:, None]
    values, vectors = (part.float() for part in torch.linalg.eigh(unit.double()))
    values = values.clamp(min=0)
    target = weight * scale @ unit
    near, penalty = weight * scale, settings.penalty
    compressed, dual = project(weight) * scale, torch.zeros_like(weight)
    for _ in range(settings.num_steps):
        near = ((target + penalty * (compressed - dual)) @ vectors / (values + penalty)) @ vectors.T + dual
        compressed = project(near / scale) * scale
        # The dual is held in units of the penalty: where that grows, it shrinks.
        dual = (near - compressed) / settings.growth
        penalty *= settings.growth
    return near / scale


def alternating_keep(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    choose: Callable[[Tensor], Tensor],
    settings: Alternation = KEEP,
) -> Bool[Tensor, "out in"]:
    """Choose a mask.

    Args:
        weight: dense weight W.
        second_moment: H, mean of x x^T, positive definite.
        choose: returns the mask that keeps the largest scores `[out, in]` among those that follow the pattern.
        settings: steps and penalties.

    Returns:
        The mask, True where a weight is kept; :func:`~nowag_pl.functional.refit.refit_kept` gives the values.
    """
    scale = second_moment.diagonal().sqrt()

    def project(target: Tensor) -> Tensor:
        return torch.where(choose((target * scale).square()), target, 0)

    return choose((alternate(weight.float(), second_moment, project, settings) * scale).square())
