"""The k-means++ start: codewords chosen among the points, far from each other.

Each is drawn with a probability proportional to its distance from those before it. Because distances only fall, several
candidates can be drawn at once from earlier distances. Each is then kept with a probability equal to the share of its
distance that remains, which gives the probabilities of one draw after the other. One search lowers all distances.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.vq.nearest import codeword_features, point_features, search
from nowag_pl.functional.vq.quantized import SubvectorWeights

# The start is drawn from a random sample of at most so many points.
START_POINTS_PER_CODEWORD = 64
# Candidates drawn at once; a distance for each pair of them is in memory.
MAX_CANDIDATES = 1024


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
    features = point_features(points, weights)  # [n, 2 d]
    offset = (features[:, points.shape[1] :] * points).sum(dim=1)  # [n]: sum_j w x^2, the part the features omit
    # The first codeword is any point, with equal chances.
    distances = torch.ones_like(offset)
    chosen = _draw(points, features, offset, distances, 1, generator)
    distances.fill_(torch.inf)
    newest, nearest, codes = chosen, torch.empty_like(offset), torch.empty_like(offset, dtype=torch.int32)
    while len(chosen) < num_codewords:
        search(points[newest], len(points))(features, codes, nearest)
        torch.minimum(distances, nearest.add_(offset).clamp_(min=0), out=distances)
        # While at most as many are added as there are, most of each distance is left.
        count = min(len(chosen), MAX_CANDIDATES)
        newest = _draw(points, features, offset, distances, count, generator)
        chosen = torch.cat([chosen, newest])
    return points[chosen[:num_codewords]]


def _draw(
    points: Float[Tensor, "n d"],
    features: Float[Tensor, "n width"],
    offset: Float[Tensor, " n"],
    distances: Float[Tensor, " n"],
    count: int,
    generator: torch.Generator,
) -> Int[Tensor, " kept"]:
    """Draw candidates by distances that leave each other out, and return those that the others let through."""
    draws = torch.rand(2, count, generator=generator, dtype=torch.float64)
    # Summed on the CPU, since on CUDA sums differ from time to time.
    cumulative = distances.cpu().cumsum(0, dtype=torch.float64)
    candidates = torch.searchsorted(cumulative, draws[0] * cumulative[-1], right=True)
    candidates = candidates.clamp_(max=len(points) - 1).to(points.device)
    products = features[candidates] @ codeword_features(points[candidates])
    apart = (products + offset[candidates, None]).clamp_(min=0).T.cpu().contiguous()  # [codeword, point]
    left = distances[candidates].cpu()
    least = draws[1] * left
    kept: list[int] = []
    for number, new in enumerate(apart):
        if left[number] >= least[number]:
            kept.append(number)
            torch.minimum(left, new, out=left)
    return candidates[kept]
