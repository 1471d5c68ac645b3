"""The nearest codeword of many points, in a metric with a weight per coordinate and point.

Up to a constant of the point, the distance `sum_j w_j (x_j - c_j)^2` is a scalar product, `[w, w x] . [c^2, -2 c]`, so
that a search is one matrix multiplication, done in chunks of points; on a CPU with Numba
:mod:`nowag_pl.kernels.cpu.kmeans` does it, on CUDA :mod:`nowag_pl.kernels.cuda.kmeans`. Of equally near
codewords the first is taken.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.kernels.dispatch import is_for_numba, is_for_triton

# Distances at a time on a CPU: 1 MiB, which stays in the cache of one core; on CUDA: 128 MiB.
CPU_CHUNK_ELEMENTS = 2**18
CUDA_CHUNK_ELEMENTS = 2**25
ROW_BLOCKS = 64
# Longest codeword for Numba, whose kernel has as many instructions.
NUMBA_MAX_DIM = 16
# Longest codeword for Triton, whose tiles have to fit into registers and shared memory.
TRITON_MAX_DIM = 32


def point_features(points: Float[Tensor, "n d"], weights: Float[Tensor, "n d"]) -> Float[Tensor, "n width"]:
    """Return w and w x of each point, `[n, 2 d]`.

    Args:
        points: x.
        weights: w.
    """
    dim = points.shape[1]
    both = points.new_empty(len(points), 2 * dim)
    both[:, :dim] = weights
    torch.mul(weights, points, out=both[:, dim:])
    return both


def codeword_features(codebook: Float[Tensor, "k d"]) -> Float[Tensor, "width k"]:
    """Return c^2 and -2 c as columns, `[2 d, k]`.

    Args:
        codebook: c.
    """
    return torch.cat([codebook.square(), -2 * codebook], dim=1).T


def chunk_points(num_codewords: int, dim: int, device: torch.device) -> int:
    """Return the number of points that gives 2^18 distances on a CPU, 2^25 elsewhere.

    Args:
        num_codewords: k.
        dim: d.
        device: where the points are.
    """
    return max(chunk_elements(device) // max(num_codewords, 2 * dim), 1)


def chunk_elements(device: torch.device) -> int:
    """Return the number of distances to compute at a time on a device."""
    return CPU_CHUNK_ELEMENTS if device.type == "cpu" else CUDA_CHUNK_ELEMENTS


def search(
    codebook: Float[Tensor, "k d"], num_points: int, chunk_size: int | None = None
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Return a function that writes nearest codewords, int32, and their products, given :func:`point_features`.

    Args:
        codebook: codewords.
        num_points: number of all points that will be searched for.
        chunk_size: points whose k distances are in memory at a time, if they are written; else :func:`chunk_points`.
    """
    if chunk_size is None:
        chunk_size = chunk_points(len(codebook), codebook.shape[1], codebook.device)
    right = codeword_features(codebook).contiguous()
    num_distances = len(codebook) * num_points
    if codebook.shape[1] <= NUMBA_MAX_DIM and is_for_numba(codebook.device, num_distances, "distances"):
        from nowag_pl.kernels.cpu.kmeans import codeword_registers, find_nearest

        registers = codeword_registers(right)
        return lambda left, codes, distances: find_nearest(left, registers, codes, distances)
    if codebook.shape[1] <= TRITON_MAX_DIM and is_for_triton(codebook.device):
        from nowag_pl.kernels.cuda import kmeans as kmeans_triton

        return lambda left, codes, distances: kmeans_triton.find_nearest(left, right, codes, distances)
    products = codebook.new_empty(min(chunk_size, num_points), len(codebook))

    def by_products(left: Tensor, codes: Tensor, distances: Tensor) -> None:
        for start in range(0, len(left), chunk_size):
            part = left[start : start + chunk_size]
            chunk = torch.mm(part, right, out=products[: len(part)])
            distances[start : start + chunk_size], codes[start : start + chunk_size] = row_minima(chunk)

    return by_products


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
