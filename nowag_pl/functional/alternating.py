"""Masks and codes chosen together with the values that go with them, by alternating directions (ADMM).

The problem is to find a weight D that has a compressed form and the least output error,
`sum_i (w_i - d_i) H (w_i - d_i)^T`, H the mean of x x^T. ADMM keeps a dense weight X beside it and alternates between
lowering the error of X near D, and projecting X onto the compressed form; a growing penalty brings both together. For
masks this is ALPS (arXiv:2406.07831), here with columns scaled to a unit diagonal of H; for codes a projection is one
step of k-means.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nowag_pl.functional.vq.kmeans import weighted_kmeans
from nowag_pl.functional.vq.quantized import Quantized, subvectors

PENALTY = 0.1  # at the start, with a unit diagonal of H
KEEP_STEPS, KEEP_GROWTH = 30, 1.1  # growth of the penalty, each step
CODES_STEPS, CODES_GROWTH = 60, 1.04


def alternating_keep(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    choose: Callable[[Tensor], Tensor],
    num_steps: int = KEEP_STEPS,
) -> Bool[Tensor, "out in"]:
    """Choose a mask.

    Args:
        weight: dense weight W.
        second_moment: H, mean of x x^T, positive definite.
        choose: gives the mask that keeps the largest scores `[out, in]` of those that follow the pattern.
        num_steps: alternations.

    Returns:
        The mask, True where a weight is kept; :func:`~nowag_pl.functional.vq.refit.refit_kept` gives the values.
    """
    scale = second_moment.diagonal().sqrt()

    def project(target: Tensor) -> Tensor:
        return torch.where(choose((target * scale).square()), target, 0)

    near = _alternate(weight.float(), second_moment, project, num_steps, KEEP_GROWTH)
    return choose((near * scale).square())


def alternating_codes(
    weight: Float[Tensor, "out in"],
    start: Quantized,
    second_moment: Float[Tensor, "in in"],
    num_steps: int = CODES_STEPS,
) -> Quantized:
    """Choose codes and codebook; the scales stay.

    Args:
        weight: dense weight W.
        start: quantized weight.
        second_moment: H, mean of x x^T, positive definite.
        num_steps: alternations.
    """
    num_codewords, dim = start.codebook.shape
    scales = start.in_scale * torch.where(start.out_scale == 0, 1, start.out_scale)[:, None]
    scales = torch.where(scales == 0, 1, scales)
    weights = scales.square() * second_moment.diagonal()
    weights = subvectors(weights / weights.mean(), dim)
    current = start

    def project(target: Tensor) -> Tensor:
        nonlocal current
        points = subvectors(target / scales, dim)
        fit = weighted_kmeans(points, weights, num_codewords, torch.Generator(), max_iters=1, codebook=current.codebook)
        current = current._replace(codebook=fit.codebook, codes=fit.codes.view_as(current.codes))
        return current.weight

    _alternate(weight.float(), second_moment, project, num_steps, CODES_GROWTH)
    return current


def _alternate(
    weight: Tensor, second_moment: Tensor, project: Callable[[Tensor], Tensor], num_steps: int, growth: float
) -> Tensor:
    """Run ADMM and return the last weight that was projected, `[out, in]`."""
    scale = second_moment.diagonal().sqrt()  # [in]
    unit = second_moment / scale / scale[:, None]
    values, vectors = (part.float() for part in torch.linalg.eigh(unit.double()))
    values = values.clamp(min=0)
    target = weight * scale @ unit
    near, penalty = weight * scale, PENALTY
    compressed, dual = project(weight) * scale, torch.zeros_like(weight)
    for _ in range(num_steps):
        near = ((target + penalty * (compressed - dual)) @ vectors / (values + penalty)) @ vectors.T + dual
        compressed = project(near / scale) * scale
        dual = (near - compressed) / growth
        penalty *= growth
    return near / scale
