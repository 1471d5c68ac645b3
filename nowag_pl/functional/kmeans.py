"""K-means with a weight per coordinate: k-means++ start and Lloyd's iterations.

The objective is `sum_i sum_j w_ij (x_ij - c_{code(i), j})^2` (NoWag-VQ, arXiv:2504.14569, section on vector
quantization). Up to a constant of the point, its distance to a codeword is a scalar product,
`[w_i, w_i x_i] . [c^2, -2 c]`, so that an assignment is one matrix multiplication, done in chunks of points.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.chunks import row_chunks

CPU_CHUNK_ELEMENTS = 2**20  # distances at a time: as many as stay in the cache
CUDA_CHUNK_ELEMENTS = 2**27
INTERLEAVED_COLUMNS = 64
START_POINTS_PER_CODEWORD = 64  # the start is drawn from a random sample of at most so many points


class KMeansResult(NamedTuple):
    """A codebook and the codeword of every point."""

    codebook: Float[Tensor, "k d"]
    codes: Int[Tensor, "n"]
    loss: float
    num_iters: int


class _Points(NamedTuple):
    """Points as the algorithm uses them."""

    features: Tensor  # [n, 2 d]: w, w x
    offset: Tensor  # [n]: sum_j w x^2, what the scalar product leaves out


def weighted_kmeans(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"],
    num_codewords: int,
    generator: torch.Generator,
    max_iters: int = 100,
    tolerance: float = 0.0,
    codebook: Float[Tensor, "k d"] | None = None,
    chunk_size: int | None = None,
) -> KMeansResult:
    """Fit a codebook and codes.

    Iterations stop when no code changes, when the loss falls by less than `tolerance` of itself, or after
    `max_iters`. Codewords that no point uses are put on the worst represented points.

    Args:
        points: points, float32.
        weights: non-negative weight of each coordinate of each point, float32. Where a codeword's points have no
            weight in a coordinate, that coordinate does not move.
        num_codewords: k, at most n.
        generator: source of randomness of the k-means++ start, on the CPU.
        max_iters: updates of the codebook at the most.
        tolerance: least relative gain of the loss to go on; 0 to go on until the codes settle.
        codebook: start from these codewords instead of k-means++.
        chunk_size: points whose k distances are in memory at a time. None: as many as make 2^20 distances on a CPU,
            2^27 elsewhere.

    Returns:
        Codebook `[k, d]`, codes `[n]` (int64), the loss of exactly this pair, and the updates that led to it.

    Raises:
        ValueError: there are fewer points than codewords, or the given codebook has another shape.
    """
    check_num_codewords(num_codewords, len(points))
    if codebook is not None and codebook.shape != (num_codewords, points.shape[1]):
        raise ValueError(
            f"Expected a codebook of shape {(num_codewords, points.shape[1])}, but got {tuple(codebook.shape)}."
        )
    if chunk_size is None:
        elements = CPU_CHUNK_ELEMENTS if points.device.type == "cpu" else CUDA_CHUNK_ELEMENTS
        chunk_size = max(elements // num_codewords, 1)
    prepared = _prepare(points, weights)
    if codebook is None:
        codebook = kmeans_plus_plus(points, weights, num_codewords, generator)
    codes, distances = _assign(prepared, codebook, chunk_size)
    loss = _total(distances)
    best = KMeansResult(codebook, codes, loss, 0)
    for iteration in range(1, max_iters + 1):
        codebook = _update(prepared, codes, codebook, distances)
        previous_codes, previous_loss = codes, loss
        codes, distances = _assign(prepared, codebook, chunk_size)
        loss = _total(distances)
        if loss <= best.loss:  # near the end, rounding can let it rise
            best = KMeansResult(codebook, codes, loss, iteration)
        if torch.equal(codes, previous_codes) or (tolerance > 0 and previous_loss - loss <= tolerance * previous_loss):
            break
    return best


def check_num_codewords(num_codewords: int, num_points: int) -> None:
    """Raise ValueError where there are fewer points than codewords."""
    if num_codewords > num_points:
        raise ValueError(
            f"Expected at most as many codewords as subvectors, but got {num_codewords} codewords for "
            f"{num_points} subvectors. Use a smaller codebook_size."
        )


def kmeans_plus_plus(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"],
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
    if len(points) > sample_size:
        sample = torch.randperm(len(points), generator=generator)[:sample_size].sort().values.to(points.device)
        points, weights = points[sample], weights[sample]
    draws = torch.rand(num_codewords, generator=generator, dtype=torch.float64).to(points.device)
    features, offset = _prepare(points, weights)
    distances = torch.ones_like(offset)  # equal chances for the first
    chosen = []
    for draw in draws:
        cumulative = distances.cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp(max=len(points) - 1)
        codeword = points[index]
        chosen.append(codeword)
        new = (offset + features @ _codeword_features(codeword[None]).squeeze(1)).clamp(min=0)
        distances = new if len(chosen) == 1 else torch.minimum(distances, new)
    return torch.stack(chosen)


def _prepare(points: Tensor, weights: Tensor) -> _Points:
    dim = points.shape[1]
    features, offset = points.new_empty(len(points), 2 * dim), points.new_empty(len(points))
    for rows in row_chunks(len(points), dim):
        features[rows, :dim], features[rows, dim:] = weights[rows], weights[rows] * points[rows]
        offset[rows] = (features[rows, dim:] * points[rows]).sum(dim=1)
    return _Points(features, offset)


def _codeword_features(codebook: Tensor) -> Tensor:
    """Return `[2 d, k]`: c^2, -2 c."""
    return torch.cat([codebook.square(), -2 * codebook], dim=1).T


def _assign(points: _Points, codebook: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the nearest codeword of every point and its distance, `[n]` and `[n]`."""
    num_points, num_codewords = len(points.offset), len(codebook)
    right = _codeword_features(codebook).contiguous()
    codes = torch.empty(num_points, dtype=torch.int64, device=codebook.device)
    nearest = torch.empty(num_points, dtype=codebook.dtype, device=codebook.device)
    products = torch.empty(min(chunk_size, num_points), num_codewords, dtype=codebook.dtype, device=codebook.device)
    for start in range(0, num_points, chunk_size):
        left = points.features[start : start + chunk_size]
        chunk = torch.mm(left, right, out=products[: len(left)])
        stop = start + len(left)
        nearest[start:stop], codes[start:stop] = row_minima(chunk)
    return codes, (nearest + points.offset).clamp_(min=0)


def row_minima(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum of each row and a column that has it, always the same one.

    On a CPU, torch's minima without indices are many times faster than those with, and so is NumPy's argmin on one
    thread: wide rows are first reduced to the minima of interleaved columns, and then only the winners are searched.
    """
    num_rows, num_columns = matrix.shape
    if matrix.device.type != "cpu":
        minimum, column = matrix.min(dim=1)
        return minimum, column
    if num_columns < INTERLEAVED_COLUMNS**2 or num_columns % INTERLEAVED_COLUMNS:
        column = torch.from_numpy(matrix.numpy().argmin(axis=1))
        return matrix.gather(1, column[:, None]).squeeze(1), column
    rows = matrix.view(num_rows, -1, INTERLEAVED_COLUMNS)  # [n, k / 64, 64]
    residue = rows.amin(dim=1).argmin(dim=1)  # [n]
    members = rows.gather(2, residue[:, None, None].expand(-1, rows.shape[1], 1)).squeeze(2)  # [n, k / 64]
    minimum, member = members.min(dim=1)
    return minimum, member * INTERLEAVED_COLUMNS + residue


def _update(points: _Points, codes: Tensor, codebook: Tensor, distances: Tensor) -> Tensor:
    """Return weighted means of the points of each codeword; unused codewords go to the worst represented points."""
    dim = codebook.shape[1]
    sums = points.features.new_zeros(len(codebook), 2 * dim)
    sums.index_add_(0, codes, points.features)
    mass, moment = sums[:, :dim], sums[:, dim:]
    updated = torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), codebook)
    unused = (torch.bincount(codes, minlength=len(codebook)) == 0).nonzero().squeeze(1)
    if len(unused):
        worst = distances.topk(len(unused)).indices
        point_mass, point_moment = points.features[worst].split(dim, dim=1)
        seeds = point_moment / point_mass.clamp(min=torch.finfo(mass.dtype).tiny)
        updated[unused] = torch.where(point_mass > 0, seeds, codebook[unused])
    return updated


def _total(distances: Tensor) -> float:
    return float(distances.sum(dtype=torch.float64))
