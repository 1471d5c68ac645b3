"""Weighted k-means as the paper's text describes it (arXiv:2504.14569), with nothing done for speed.

The yardstick of the other benchmarks: all distances in one matrix, coordinate by coordinate, and a Python loop over
the clusters.
"""

from torch import Tensor


def lloyd(points: Tensor, weights: Tensor, codebook: Tensor, num_iters: int) -> tuple[Tensor, Tensor]:
    """Run Lloyd's iterations from a given start.

    Args:
        points: `[n, d]`.
        weights: `[n, d]`.
        codebook: start `[k, d]`.
        num_iters: assignments and updates to do.

    Returns:
        Codebook `[k, d]` and codes `[n]`.
    """
    codebook = codebook.clone()
    for _ in range(num_iters):
        codes = _distances(points, weights, codebook).argmin(dim=1)
        for cluster in range(len(codebook)):
            members = codes == cluster
            mass = weights[members].sum(dim=0)
            if members.any() and bool((mass > 0).all()):
                codebook[cluster] = (weights[members] * points[members]).sum(dim=0) / mass
    return codebook, _distances(points, weights, codebook).argmin(dim=1)


def _distances(points: Tensor, weights: Tensor, codebook: Tensor) -> Tensor:
    distances = points.new_zeros(len(points), len(codebook))
    for j in range(points.shape[1]):
        distances += weights[:, j, None] * (points[:, j, None] - codebook[None, :, j]).square()
    return distances


def prune(weight: Tensor, second_moment: Tensor, sparsity: float) -> Tensor:
    """Prune as NoWag-P's pseudo-code says, by a sort of all scores.

    Args:
        weight: `[out, in]`.
        second_moment: `[in]`.
        sparsity: fraction to remove.

    Returns:
        The weight with zeros, `[out, in]`.
    """
    in_scale = weight.square().sum(dim=0).sqrt()
    scaled = weight / in_scale
    out_scale = scaled.square().sum(dim=1, keepdim=True).sqrt()
    scores = ((scaled / out_scale).square() * second_moment).flatten()
    order = scores.argsort()
    pruned = weight.clone().flatten()
    pruned[order[: round(sparsity * len(order))]] = 0
    return pruned.view_as(weight)
