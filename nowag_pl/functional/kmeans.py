"""K-means with a weight per coordinate: k-means++ start and Lloyd's iterations.

The objective is `sum_i sum_j w_ij (x_ij - c_{code(i), j})^2` (NoWag-VQ, arXiv:2504.14569, section on vector
quantization). Up to a constant of the point, its distance to a codeword is a scalar product,
`[w_i, w_i x_i] . [c^2, -2 c]`, so that an assignment is one matrix multiplication, done in chunks of points, or on a
CPU, if Numba is installed, by :mod:`nowag_pl.functional.kmeans_numba`. The left side is made anew for some points at a
time, and their weighted sums are taken while it is there. Of equally near codewords the first is taken.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.chunks import CHUNK_ELEMENTS
from nowag_pl.functional.optional import has_module
from nowag_pl.functional.quantized import SubvectorWeights

CPU_CHUNK_ELEMENTS = 2**18  # distances at a time: 1 MiB, which stays in the cache of one core
CUDA_CHUNK_ELEMENTS = 2**25  # 128 MiB
ROW_BLOCKS = 64
NUMBA_MIN_DISTANCES = 2**22  # of one assignment, above which compiling pays off
NUMBA_MIN_START_DISTANCES = 2**26  # of a start
NUMBA_MAX_DIM = 16  # its instructions are as many
TRITON_MAX_DIM = 32  # its tiles fit into registers and shared memory
CUDA_PART_ELEMENTS = 2**25  # features at a time, 128 MiB: few kernels are launched
START_POINTS_PER_CODEWORD = 64  # the start is drawn from a random sample of at most so many points


class KMeansResult(NamedTuple):
    """A codebook and the codeword of every point."""

    codebook: Float[Tensor, "k d"]
    codes: Int[Tensor, "n"]
    loss: float
    num_iters: int


class _Points(NamedTuple):
    """Points, and how many of them are worked on at a time."""

    points: Tensor  # [n, d]
    weights: Tensor | SubvectorWeights  # [n, d]
    chunk_size: int

    def features(self, selected: slice | Tensor) -> Tensor:
        """Return those of some points, `[m, 2 d]`."""
        return _features(self.points[selected], self.weights[selected])

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of whole chunks of points with their features, few megabytes at a time on a CPU."""
        num_points, dim = self.points.shape
        elements = CUDA_PART_ELEMENTS if self.points.is_cuda else CHUNK_ELEMENTS
        size = max(elements // (2 * dim * self.chunk_size), 1) * self.chunk_size
        for start in range(0, num_points, size):
            selected = slice(start, min(start + size, num_points))
            yield selected, self.features(selected)


class _Assignment(NamedTuple):
    """Codes and what follows from them."""

    codes: Tensor  # [n], int32
    distances: Tensor  # [n]
    sums: Tensor  # [k, 2 d]: features of each codeword's points
    loss: float


def weighted_kmeans(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"] | SubvectorWeights,
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
        weights: non-negative weight of each coordinate of each point, float32, or what gives those of some points.
            Where a codeword's points have no weight in a coordinate, that coordinate does not move.
        num_codewords: k, at most n.
        generator: source of randomness of the k-means++ start, on the CPU.
        max_iters: updates of the codebook at the most.
        tolerance: least relative gain of the loss to go on; 0 to go on until the codes settle.
        codebook: start from these codewords instead of k-means++.
        chunk_size: points whose k distances are in memory at a time. None: as many as make 2^18 distances on a CPU,
            2^25 elsewhere.

    Returns:
        Codebook `[k, d]`, codes `[n]` (int32), the loss of exactly this pair, and the updates that led to it.

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
        chunk_size = max(elements // max(num_codewords, 2 * points.shape[1]), 1)
    if codebook is None:
        codebook = kmeans_plus_plus(points, weights, num_codewords, generator)
    prepared = _Points(points, weights, chunk_size)
    current = _assign(prepared, codebook)
    best = KMeansResult(codebook, current.codes, current.loss, 0)
    for iteration in range(1, max_iters + 1):
        codebook = _update(prepared, current, codebook)
        previous_codes, previous_loss = current.codes, current.loss
        del current  # it is large
        current = _assign(prepared, codebook)
        gain = previous_loss - current.loss
        if current.loss <= best.loss:  # near the end, rounding can let it rise
            best = KMeansResult(codebook, current.codes, current.loss, iteration)
        if torch.equal(current.codes, previous_codes) or (tolerance > 0 and gain <= tolerance * previous_loss):
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
    if _is_for_numba(points, num_codewords, NUMBA_MIN_START_DISTANCES):
        from nowag_pl.functional.kmeans_start_numba import draw_points

        return points[draw_points(points, weights, draws)]
    dim = points.shape[1]
    features, candidates = _features(points, weights), _codeword_features(points).T  # [n, 2 d]
    offset = (features[:, dim:] * points).sum(dim=1)  # [n]: sum_j w x^2, what the scalar product leaves out
    distances = torch.ones_like(offset)  # equal chances for the first
    chosen: list[Tensor] = []
    for draw in draws.to(points.device):
        cumulative = distances.cumsum(0, dtype=torch.float64)
        index = torch.searchsorted(cumulative, draw * cumulative[-1], right=True).clamp_(max=len(points) - 1)
        new = (features @ candidates[index]).add_(offset).clamp_(min=0)
        distances = torch.minimum(distances, new) if chosen else new
        chosen.append(index)
    return points[torch.stack(chosen)]


def _features(points: Tensor, weights: Tensor) -> Tensor:
    """Return `[n, 2 d]`: w, w x."""
    dim = points.shape[1]
    features = points.new_empty(len(points), 2 * dim)
    features[:, :dim] = weights
    torch.mul(weights, points, out=features[:, dim:])
    return features


def _codeword_features(codebook: Tensor) -> Tensor:
    """Return `[2 d, k]`: c^2, -2 c."""
    return torch.cat([codebook.square(), -2 * codebook], dim=1).T


def _assign(points: _Points, codebook: Tensor) -> _Assignment:
    """Choose the nearest codeword of every point."""
    (num_points, dim), num_codewords, chunk_size = points.points.shape, len(codebook), points.chunk_size
    codes = torch.empty(num_points, dtype=torch.int32, device=codebook.device)
    distances = codebook.new_empty(num_points)
    sums, loss = codebook.new_zeros(num_codewords, 2 * dim), codebook.new_zeros((), dtype=torch.float64)
    find_nearest = _search(codebook, num_points, chunk_size)
    for selected, features in points.parts():
        part_codes, nearest = codes[selected], distances[selected]  # views
        find_nearest(features, part_codes, nearest)
        nearest.add_((features[:, dim:] * points.points[selected]).sum(dim=1)).clamp_(min=0)
        _add_by_code(sums, part_codes.long(), features)
        loss += nearest.sum(dtype=torch.float64)
    return _Assignment(codes, distances, sums, float(loss))


def _add_by_code(sums: Tensor, codes: Tensor, features: Tensor) -> None:
    """Add the features of each codeword's points, always in the same order."""
    if sums.device.type == "cpu":
        sums.index_add_(0, codes, features)  # with int32 codes it takes three times as long
    else:  # where it would add in any order
        add_sorted(sums, codes, features)


def add_sorted(sums: Float[Tensor, "k m"], codes: Int[Tensor, "n"], features: Float[Tensor, "n m"]) -> None:
    """Add features to the sums of their codes, one code after the other.

    Args:
        sums: sums so far, which are written.
        codes: code of each row of the features, int64.
        features: what is added.
    """
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=len(sums))
    sums += torch.segment_reduce(features[order], "sum", lengths=counts, axis=0, unsafe=True)


def _search(codebook: Tensor, num_points: int, chunk_size: int) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return what writes the nearest codewords of features, and their distances but for the constant of the point."""
    right = _codeword_features(codebook).contiguous()
    if _is_for_numba(codebook, num_points, NUMBA_MIN_DISTANCES):
        from nowag_pl.functional.kmeans_numba import codeword_registers, find_nearest

        registers = codeword_registers(right)
        return lambda features, codes, distances: find_nearest(features, registers, codes, distances)
    if codebook.is_cuda and codebook.shape[1] <= TRITON_MAX_DIM and has_module("triton"):
        from nowag_pl.functional import kmeans_triton

        return lambda features, codes, distances: kmeans_triton.find_nearest(features, right, codes, distances)
    products = codebook.new_empty(min(chunk_size, num_points), len(codebook))

    def search(features: Tensor, codes: Tensor, distances: Tensor) -> None:
        for start in range(0, len(features), chunk_size):
            left = features[start : start + chunk_size]
            chunk = torch.mm(left, right, out=products[: len(left)])
            distances[start : start + chunk_size], codes[start : start + chunk_size] = row_minima(chunk)

    return search


def _is_for_numba(vectors: Tensor, num_others: int, min_distances: int) -> bool:
    """Tell whether the distances of some vectors `[n, d]` to as many others are to be computed by Numba."""
    num_vectors, dim = vectors.shape
    is_large = num_vectors * num_others >= min_distances
    return vectors.device.type == "cpu" and dim <= NUMBA_MAX_DIM and is_large and has_module("numba")


def row_minima(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the minimum of each row and the first column that has it.

    On a CPU, torch's minima without indices are many times faster than those with, and so is NumPy's argmin on one
    thread: wide rows are first reduced to the minima of blocks, and then only the first block that wins is searched.
    """
    num_rows, num_columns = matrix.shape
    if matrix.device.type != "cpu":
        minimum, column = matrix.min(dim=1)
        return minimum, column
    if num_columns < ROW_BLOCKS**2 or num_columns % ROW_BLOCKS:
        column = torch.from_numpy(matrix.numpy().argmin(axis=1))
        return matrix.gather(1, column[:, None]).squeeze(1), column
    rows = matrix.view(num_rows, ROW_BLOCKS, -1)  # [n, 64, k / 64]
    block = rows.amin(dim=2).argmin(dim=1)  # [n]
    members = rows.gather(1, block[:, None, None].expand(-1, 1, rows.shape[2])).squeeze(1)  # [n, k / 64]
    minimum, member = members.min(dim=1)
    return minimum, block * rows.shape[2] + member


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the indices of the largest values, some values at a time: the workspace of `topk` is large."""
    best = torch.empty(0, dtype=torch.int64, device=values.device)
    for start in range(0, len(values), CHUNK_ELEMENTS):
        part = values[start : start + CHUNK_ELEMENTS]
        candidates = torch.cat([best, start + part.topk(min(count, len(part))).indices])
        best = candidates[values[candidates].topk(min(count, len(candidates))).indices]
    return best


def _update(points: _Points, assignment: _Assignment, codebook: Tensor) -> Tensor:
    """Return weighted means of the points of each codeword; unused codewords go to the worst represented points."""
    dim = codebook.shape[1]
    mass, moment = assignment.sums.split(dim, dim=1)
    updated = torch.where(mass > 0, moment / mass.clamp(min=torch.finfo(mass.dtype).tiny), codebook)
    used = torch.zeros(len(codebook), dtype=torch.bool, device=codebook.device)
    for codes in assignment.codes.split(CHUNK_ELEMENTS):
        used[codes] = True
    unused = (~used).nonzero().squeeze(1)
    if len(unused):
        worst = _largest(assignment.distances, len(unused))
        point_mass, point_moment = points.features(worst).split(dim, dim=1)
        seeds = point_moment / point_mass.clamp(min=torch.finfo(mass.dtype).tiny)
        updated[unused] = torch.where(point_mass > 0, seeds, codebook[unused])
    return updated
