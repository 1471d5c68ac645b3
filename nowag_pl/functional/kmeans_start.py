"""The k-means++ start: codewords chosen among the points, far from each other."""

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.nearest import codeword_features, is_for_numba, point_features
from nowag_pl.functional.quantized import SubvectorWeights

START_POINTS_PER_CODEWORD = 64  # the start is drawn from a random sample of at most so many points
NUMBA_MIN_DISTANCES = 2**26  # of all draws, above which other rounding and compiling pay off


def kmeans_plus_plus(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"] | SubvectorWeights,
    num_codewords: int,
    generator: torch.Generator,
) -> Float[Tensor, "k d"]:
    """Choose starting codewords among the points, each with probability proportional to its weighted distance.

    Args:
        points: points; at most 64 per codeword, chosen at random, are considered.
        weights: weight of each coordinate of each point.
        num_codewords: k.
        generator: source of randomness, on the CPU.

    Returns:
        Codewords `[k, d]`.
    """
    sample_size = START_POINTS_PER_CODEWORD * num_codewords
    sample: slice | Tensor = slice(0, len(points))
    if len(points) > sample_size:
        sample = torch.randperm(len(points), generator=generator)[:sample_size].sort().values.to(points.device)
    points, weights = points[sample], weights[sample]
    draws = torch.rand(num_codewords, generator=generator, dtype=torch.float64)
    if is_for_numba(points, num_codewords, NUMBA_MIN_DISTANCES):
        from nowag_pl.functional.kmeans_start_numba import draw_points

        return points[draw_points(points, weights, draws)]
    dim = points.shape[1]
    left, candidates = point_features(points, weights), codeword_features(points).T  # [n, 2 d]
    offset = (left[:, dim:] * points).sum(dim=1)  # [n]: sum_j w x^2, what the scalar product leaves out
    distances = torch.ones_like(offset)  # equal chances for the first
    chosen: list[Tensor] = []
    for draw in draws.to(points.device):
        cumulative = distances.cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp_(max=len(points) - 1)
        new = (left @ candidates[index]).add_(offset).clamp_(min=0)
        distances = torch.minimum(distances, new) if chosen else new
        chosen.append(index)
    return points[torch.stack(chosen)]
