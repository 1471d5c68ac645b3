"""K-means with a weight per coordinate: k-means++ start and Lloyd's iterations.

The objective is `sum_i sum_j w_ij (x_ij - c_{code(i), j})^2` (NoWag-VQ, arXiv:2504.14569, section on vector
quantization). Assignments are products (:mod:`nowag_pl.functional.vq.nearest`) whose left side is computed for some
points at a time, and their weighted sums are taken while it is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.chunks import CHUNK_ELEMENTS
from nowag_pl.functional.vq.kmeans_start import kmeans_plus_plus
from nowag_pl.functional.vq.nearest import chunk_points, point_features, search
from nowag_pl.functional.vq.quantized import SubvectorWeights

# Features at a time on CUDA: 128 MiB, so that few kernels are launched.
CUDA_PART_ELEMENTS = 2**25


class KMeansResult(NamedTuple):
    """A codebook and the codeword of every point."""

    codebook: Float[Tensor, "k d"]
    codes: Int[Tensor, " n"]
    loss: float
    num_iters: int


class _Points(NamedTuple):
    """Points, and the number of points processed at a time."""

    points: Tensor  # [n, d]
    weights: Tensor | SubvectorWeights  # [n, d]
    chunk_size: int

    def features(self, selected: slice | Tensor) -> Tensor:
        """Return those of some points, `[m, 2 d]`."""
        return point_features(self.points[selected], self.weights[selected])

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of whole chunks of points with their features, few megabytes at a time on a CPU."""
        num_points, dim = self.points.shape
        elements = CUDA_PART_ELEMENTS if self.points.is_cuda else CHUNK_ELEMENTS
        size = max(elements // (2 * dim * self.chunk_size), 1) * self.chunk_size
        for start in range(0, num_points, size):
            selected = slice(start, min(start + size, num_points))
            yield selected, self.features(selected)


class _Assignment(NamedTuple):
    """Codes, and the sums and loss that follow from them."""

    codes: Tensor  # [n], int32
    distances: Tensor  # [n]
    sums: Tensor  # [k, 2 d]: features of each codeword's points
    loss: float


@dataclass(frozen=True)
class KMeansSettings:
    """The size of a codebook, and the limits of its fit.

    Attributes:
        num_codewords: k, at most the number of points.
        max_iters: largest number of updates of the codebook.
        tolerance: least relative gain of the loss to continue; 0 to continue until the codes settle.
        chunk_size: points whose k distances are in memory at a time. None: :func:`nearest.chunk_points`.
    """

    num_codewords: int
    max_iters: int = 100
    tolerance: float = 0.0
    chunk_size: int | None = None


def weighted_kmeans(
    points: Float[Tensor, "n d"],
    weights: Float[Tensor, "n d"] | SubvectorWeights,
    settings: KMeansSettings,
    generator: torch.Generator,
    codebook: Float[Tensor, "k d"] | None = None,
) -> KMeansResult:
    """Fit a codebook and codes.

    Iterations stop when no code changes, when the loss falls by less than the tolerance, or after the most that the
    settings allow. Codewords that no point uses are put on the worst represented points.

    Args:
        points: points, float32.
        weights: non-negative weight of each coordinate of each point, float32, or a function that gives those of some
            points.
            Where a codeword's points have no weight in a coordinate, that coordinate does not move.
        settings: size of the codebook, and when to stop.
        generator: source of randomness of the k-means++ start, on the CPU.
        codebook: start from these codewords instead of k-means++.

    Returns:
        Codebook `[k, d]`, codes `[n]` (int32), the loss of exactly this pair, and the updates that led to it.

    Raises:
        ValueError: there are fewer points than codewords, or the given codebook has another shape.
    """
    num_codewords, tolerance = settings.num_codewords, settings.tolerance
    check_num_codewords(num_codewords, len(points))
    if codebook is not None and codebook.shape != (num_codewords, points.shape[1]):
        raise ValueError(
            f"Expected a codebook of shape {(num_codewords, points.shape[1])}, but got {tuple(codebook.shape)}."
        )
    if codebook is None:
        codebook = kmeans_plus_plus(points, weights, num_codewords, generator)
    chunk_size = settings.chunk_size or chunk_points(num_codewords, points.shape[1], points.device)
    prepared = _Points(points, weights, chunk_size)
    current = _assign(prepared, codebook)
    best = KMeansResult(codebook, current.codes, current.loss, 0)
    for iteration in range(1, settings.max_iters + 1):
        codebook = _update(prepared, current, codebook)
        previous_codes, previous_loss = current.codes, current.loss
        # It is large, and not needed while the next one is made.
        del current
        current = _assign(prepared, codebook)
        gain = previous_loss - current.loss
        # Near the end, rounding can let the loss rise.
        if current.loss <= best.loss:
            best = KMeansResult(codebook, current.codes, current.loss, iteration)
        if torch.equal(current.codes, previous_codes) or (tolerance > 0 and gain <= tolerance * previous_loss):
            break
    return best


def check_num_codewords(num_codewords: int, num_points: int) -> None:
    """Raise ValueError if there are fewer points than codewords."""
    if num_codewords > num_points:
        raise ValueError(
            f"Expected at most as many codewords as subvectors, but got {num_codewords} codewords for "
            f"{num_points} subvectors. Use a smaller codebook_size."
        )


def _assign(points: _Points, codebook: Tensor) -> _Assignment:
    """Choose the nearest codeword of every point."""
    (num_points, dim), num_codewords, chunk_size = points.points.shape, len(codebook), points.chunk_size
    codes = torch.empty(num_points, dtype=torch.int32, device=codebook.device)
    distances = codebook.new_empty(num_points)
    sums, loss = codebook.new_zeros(num_codewords, 2 * dim), codebook.new_zeros((), dtype=torch.float64)
    find_nearest = search(codebook, num_points, chunk_size)
    for selected, features in points.parts():
        # Views, into which the search writes.
        part_codes, nearest = codes[selected], distances[selected]
        find_nearest(features, part_codes, nearest)
        nearest.add_((features[:, dim:] * points.points[selected]).sum(dim=1)).clamp_(min=0)
        _add_by_code(sums, part_codes.long(), features)
        loss += nearest.sum(dtype=torch.float64)
    return _Assignment(codes, distances, sums, float(loss))


def _add_by_code(sums: Tensor, codes: Tensor, features: Tensor) -> None:
    """Add the features of each codeword's points, always in the same order."""
    if sums.device.type == "cpu":
        # The codes are int64: with int32 this takes three times as long.
        sums.index_add_(0, codes, features)
    else:
        # Elsewhere index_add_ adds in any order.
        add_sorted(sums, codes, features)


def add_sorted(sums: Float[Tensor, "k m"], codes: Int[Tensor, " n"], features: Float[Tensor, "n m"]) -> None:
    """Add features to the sums of their codes, one code after the other.

    Args:
        sums: sums so far, which are written.
        codes: code of each row of the features, int64.
        features: the values to add up.
    """
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=len(sums))
    sums += torch.segment_reduce(features[order], "sum", lengths=counts, axis=0, unsafe=True)


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
