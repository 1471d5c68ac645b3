"""Large matrices one piece at a time, so that intermediate results take little memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# 4 MiB in float32.
CHUNK_ELEMENTS = 2**20
# Logits of two models that are compared, a copy of each, in float32.
LOGIT_BYTES = 16
LOSS_BYTES = 24  # in training: itself, its log-probability, gradients and copies in float32
DISTILLATION_BYTES = 40  # and the same of the teacher
CHUNK_BYTES = 2**28


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


def position_chunks(
    num_sequences: int,
    num_positions: int,
    vocabulary: int,
    max_bytes: int = CHUNK_BYTES,
    logit_bytes: int = LOGIT_BYTES,
) -> Iterator[slice]:
    """Yield positions of sequences whose logits are in memory together, one of each sequence at least.

    Args:
        num_sequences: sequences in a batch.
        num_positions: positions of each.
        vocabulary: logits at each position.
        max_bytes: memory for them.
        logit_bytes: bytes for each of them; by default of two models that are compared.

    Example:
        >>> [*position_chunks(num_sequences=2, num_positions=5, vocabulary=100, max_bytes=10_000)]
        [slice(0, 3, None), slice(3, 5, None)]
    """
    size = max(max_bytes // (logit_bytes * max(num_sequences, 1) * vocabulary), 1)
    for start in range(0, num_positions if num_sequences else 0, size):
        yield slice(start, min(start + size, num_positions))


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
