"""Large matrices one piece at a time, so that intermediate results take little memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# 4 MiB in float32.
CHUNK_ELEMENTS = 2**20


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Yield slices of rows that hold at most `CHUNK_ELEMENTS` elements each, but at least one row.

    Args:
        num_rows: rows of the matrix.
        num_columns: columns of the matrix.

    Example:
        >>> [*row_chunks(3, 2**19)]
        [slice(0, 2, None), slice(2, 4, None)]
    """
    size = max(CHUNK_ELEMENTS // max(num_columns, 1), 1)
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def fill_rows(matrix: Tensor, compute: Callable[[slice], Tensor]) -> Tensor:
    """Fill a matrix that nobody else holds, a chunk of rows at a time, and return it.

    Args:
        matrix: new matrix `[rows, columns]`, such as `torch.empty` gives.
        compute: returns some rows, in any type.
    """
    for rows in row_chunks(*matrix.shape):
        matrix[rows] = compute(rows)
    return matrix


def empty_like(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a new matrix of the same shape on the same device."""
    return torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
