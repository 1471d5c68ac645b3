"""The k-means++ start of many points on a CPU, compiled by Numba when it is first used.

Each draw passes over all points once, bound by how fast they can be read: coordinates and weights lie in blocks, and a
block's distances are lowered and summed while they are in the cache. Distances `sum_j w_j (x_j - c_j)^2` are summed as
they stand, not as a matrix product, so that a draw that falls onto the border of two points may take the other one.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import no_type_check

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.threads import in_threads

_BLOCK = 512  # points


def draw_points(
    points: Float[Tensor, "n d"], weights: Float[Tensor, "n d"], draws: Float[Tensor, "k"]
) -> Int[Tensor, "k"]:
    """Return the points that k-means++ chooses, each with probability proportional to its weighted distance.

    Args:
        points: points, float32.
        weights: weight of each coordinate, float32.
        draws: uniform random numbers in [0, 1), float64.
    """
    num_points, dim = points.shape
    num_blocks = -(-num_points // _BLOCK)
    both = F.pad(torch.cat([points, weights], dim=1), (0, 0, 0, num_blocks * _BLOCK - num_points))
    blocks = both.view(num_blocks, _BLOCK, 2 * dim).transpose(1, 2).contiguous().numpy()  # [blocks, 2 d, points]
    distances = np.ones((num_blocks, _BLOCK), np.float32)  # equal chances for the first
    distances.reshape(-1)[num_points:] = 0
    sums = distances.sum(axis=1, dtype=np.float64)
    codeword, lower = np.empty(dim, np.float32), _lower_kernel(dim)
    chosen: list[int] = []

    def share(first: int, last: int) -> None:
        lower(first, last, blocks, codeword, distances, sums)

    for draw in draws.tolist():
        chosen.append(min(_locate(distances, sums, draw), num_points - 1))
        codeword[:] = points[chosen[-1]].numpy()
        if len(chosen) == 1:
            distances.reshape(-1)[:num_points] = np.inf
        in_threads(share, 0, num_blocks)
    return torch.tensor(chosen)


@numba.njit(nogil=True)
@no_type_check  # Numba compiles plain functions
def _locate(distances: np.ndarray, sums: np.ndarray, draw: float) -> int:
    """Return the first point up to which the distances sum to more than a share of their total."""
    target, block = draw * np.sum(sums), 0
    while block < len(sums) - 1 and target >= sums[block]:
        target -= sums[block]
        block += 1
    for index in range(distances.shape[1]):
        target -= distances[block, index]
        if target < 0:
            return block * distances.shape[1] + index
    return distances.size


@numba.njit(nogil=True, fastmath={"reassoc"})
@no_type_check
def _sum(values: np.ndarray) -> float:
    total = 0.0
    for index in range(len(values)):
        total += np.float64(values[index])
    return total


@lru_cache
@no_type_check
def _lower_kernel(dim: int) -> Callable[..., None]:
    @numba.njit(nogil=True, fastmath={"contract"})
    def lower(
        first: int, last: int, blocks: np.ndarray, codeword: np.ndarray, distances: np.ndarray, sums: np.ndarray
    ) -> None:
        """Lower the distances of some blocks to those from a new codeword, and sum them."""
        for number in range(first, last):
            block, nearest = blocks[number], distances[number]
            for point in range(len(nearest)):
                distance = np.float32(0)
                for column in range(dim):
                    error = block[column, point] - codeword[column]
                    distance += block[dim + column, point] * error * error
                nearest[point] = distance if distance < nearest[point] else nearest[point]
            sums[number] = _sum(nearest)

    return lower
