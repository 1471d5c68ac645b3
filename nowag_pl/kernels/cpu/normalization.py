"""Norms of large matrices and the scores that follow from them on a CPU, compiled by Numba when they are first used.

The matrix is read twice: for the norms of its columns, and row by row for the norm and the scores of a row.
"""

from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float
from torch import Tensor

from nowag_pl.kernels.cpu.threads import in_threads

# Rows that a sum of squares meets at a time.
_ROWS = 4
_compiled = numba.njit(nogil=True, error_model="numpy")


def add_squares(weight: Float[Tensor, "rows in"], squares: Float[Tensor, " in"]) -> None:
    """Add the squares of some rows to the sums of their columns.

    Args:
        weight: float32.
        squares: sums so far, float64.
    """
    arrays = weight.numpy(), squares.numpy()
    in_threads(lambda first, last: _add_squares(first, last, *arrays), 0, weight.shape[1])


def write_row_norms(
    weight: Float[Tensor, "rows in"], in_scale: Float[Tensor, " in"], out: Float[Tensor, " rows"]
) -> None:
    """Write the norms of rows divided by `in_scale`, with 1 in the place of zeros.

    Args:
        weight: float32.
        in_scale: r1.
        out: where they go, float32.
    """
    arrays = weight.numpy(), in_scale.numpy(), out.numpy()
    in_threads(lambda first, last: _write_row_norms(first, last, *arrays), 0, len(weight))


def write_scores(
    weight: Float[Tensor, "rows in"],
    in_scale: Float[Tensor, " in"],
    second_moment: Float[Tensor, " in"],
    out: Float[Tensor, "rows in"],
) -> None:
    """Write the importance `h_j W_bar_ij^2` of the weights of some rows.

    Args:
        weight: float32.
        in_scale: r1.
        second_moment: h.
        out: where the scores go, float32.
    """
    arrays = weight.numpy(), in_scale.numpy(), second_moment.numpy(), out.numpy()
    in_threads(lambda first, last: _write_scores(first, last, *arrays), 0, len(weight))


@_compiled
@no_type_check  # Numba compiles plain functions
def _add_squares(first: int, last: int, weight: np.ndarray, squares: np.ndarray) -> None:
    sums, whole = squares[first:last], len(weight) // _ROWS * _ROWS
    for start in range(0, whole, _ROWS):
        rows = weight[start : start + _ROWS, first:last]
        for column in range(len(sums)):
            total = sums[column]
            for row in range(_ROWS):
                value = np.float64(rows[row, column])
                total += value * value
            sums[column] = total
    for row in range(whole, len(weight)):
        values = weight[row, first:last]
        for column in range(len(sums)):
            value = np.float64(values[column])
            sums[column] += value * value


@numba.njit(nogil=True, fastmath={"reassoc"})
@no_type_check
def _norm(values: np.ndarray) -> float:
    """Return the Euclidean norm, 1 if it is zero."""
    total = 0.0
    for index in range(len(values)):
        value = np.float64(values[index])
        total += value * value
    norm = np.float32(np.sqrt(total))
    return norm if norm > 0 else np.float32(1)


@_compiled
@no_type_check
def _write_row_norms(first: int, last: int, weight: np.ndarray, in_scale: np.ndarray, out: np.ndarray) -> None:
    scaled = np.empty(len(in_scale), np.float32)
    for row in range(first, last):
        for column in range(len(in_scale)):
            scaled[column] = weight[row, column] / in_scale[column]
        out[row] = _norm(scaled)


@_compiled
@no_type_check
def _write_scores(
    first: int, last: int, weight: np.ndarray, in_scale: np.ndarray, second_moment: np.ndarray, out: np.ndarray
) -> None:
    for row in range(first, last):
        scores = out[row]
        for column in range(len(in_scale)):
            scores[column] = weight[row, column] / in_scale[column]
        norm = _norm(scores)
        for column in range(len(in_scale)):
            normalized = scores[column] / norm
            scores[column] = normalized * normalized * second_moment[column]
