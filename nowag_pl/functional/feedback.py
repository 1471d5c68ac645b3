"""Quantization with error feedback, a block of columns at a time (GPTQ, arXiv:2210.17323), for any quantizer.

The error that counts is that of the linear's output, `sum_i (w_i - q_i) H (w_i - q_i)^T` over the rows i, with H the
mean of x x^T. Once a block of columns is quantized, the best that the columns after it can do about its error e is to
change by `-e D U`, where U is the rows of the block in the upper triangular factor of H's inverse, and D the inverse of
the factor's diagonal block. Given that, the error of the block itself costs `e D D^T e^T`.

Where the final loss couples the outputs as well, the error is `tr(H_O E H E^T)` (YAQA, arXiv:2505.22988). Feedback then
runs along both sides: each tile of rows and columns makes up for the errors of the tiles before it in its rows, and of
those before it in its columns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Quantize = Callable[[slice, Tensor, Tensor], Tensor]
"""Quantizes a block: columns, target `[out, width]` and metric M `[width, width]` to a reconstruction `[out, width]`.

The smaller `(t_i - q_i) M (t_i - q_i)^T` of every row, the better.
"""


QuantizeTiles = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Quantizes n tiles: numbers of their row blocks and column blocks `[n]`, targets to reconstructions `[n, rows, cols]`.

No two of the tiles share rows or columns, and none depends on another.
"""


class Side(NamedTuple):
    """One side of a weight, in blocks of equal width.

    Attributes:
        feed: `D U` of every block, `[blocks, width, size]`; zero up to the block's end.
        metrics: `D D^T` of every block, `[blocks, width, width]`.
    """

    feed: Float[Tensor, "blocks width size"]
    metrics: Float[Tensor, "blocks width width"]

    @classmethod
    def of(cls, factor: Float[Tensor, "size size"], width: int) -> "Side":
        """Return a side of the given second moments.

        Args:
            factor: upper triangular U with `U^T U` the inverse of H.
            width: rows or columns of a block; it has to divide the size.

        Raises:
            ValueError: it does not.
        """
        size = len(factor)
        if size % width:
            raise ValueError(f"Expected a width that divides {size}, but got {width}.")
        rows = factor.unflatten(0, (-1, width))  # [blocks, width, size]
        corners = torch.stack([rows[index, :, columns] for index, columns in enumerate(column_blocks(size, width))])
        identity = torch.eye(width, device=factor.device).expand_as(corners)
        inverse = torch.linalg.solve_triangular(corners, identity, upper=True)
        places = torch.arange(size, device=factor.device)
        later = places >= places[::width, None] + width
        return cls((inverse @ rows) * later[:, None], inverse @ inverse.mT)


def column_blocks(num_columns: int, width: int) -> list[slice]:
    """Return slices of `width` columns each; the last one may be narrower.

    Args:
        num_columns: columns of the matrix.
        width: columns of a block.

    Example:
        >>> column_blocks(5, 3)
        [slice(0, 3, None), slice(3, 5, None)]
    """
    return [slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


def quantize_with_feedback(
    weight: Float[Tensor, "out in"], factor: Float[Tensor, "in in"], width: int, quantize: Quantize
) -> Float[Tensor, "out in"]:
    """Quantize a weight from the first columns to the last, each block for the errors of those before it as well.

    Args:
        weight: dense weight W, float32.
        factor: upper triangular U with `U^T U` the inverse of H
            (:func:`~nowag_pl.functional.moments.damped_inverse_factor`).
        width: columns of a block.
        quantize: quantizes a block; it must not write into its arguments.

    Returns:
        The reconstruction of all blocks, side by side.

    Example:
        >>> import torch
        >>> weight, factor = torch.tensor([[0.4, 0.9]]), torch.tensor([[1.0, 0.9], [0.0, 1.0]])
        >>> quantize_with_feedback(weight, factor, 1, lambda columns, target, metric: target.round())
        tensor([[0., 1.]])
    """
    target, blocks = weight.clone(), []
    for columns in column_blocks(weight.shape[1], width):
        identity = torch.eye(columns.stop - columns.start, device=weight.device)
        inverse = torch.linalg.solve_triangular(factor[columns, columns], identity, upper=True)
        block = quantize(columns, target[:, columns], inverse @ inverse.T)
        target[:, columns.stop :] -= (target[:, columns] - block) @ inverse @ factor[columns, columns.stop :]
        blocks.append(block)
    return torch.cat(blocks, dim=1)


def quantize_two_sided(
    weight: Float[Tensor, "out in"], rows: Side, columns: Side, quantize: QuantizeTiles
) -> Float[Tensor, "out in"]:
    """Quantize a weight in tiles, each for the errors of the tiles to its left and above it as well.

    The tiles of a diagonal do not depend on each other and are quantized together. With rows that are not coupled, the
    result is that of :func:`quantize_with_feedback`.

    Args:
        weight: dense weight W, float32.
        rows: the outputs, whose second moments are those of gradients, H_O.
        columns: the inputs, whose second moments are H.
        quantize: quantizes tiles; it must not write into its arguments. The smaller `tr(M_O E M E^T)` of each tile with
            the metrics of its blocks, the better.

    Returns:
        The reconstruction.
    """
    (num_rows, height, num_out), (num_columns, width, num_in) = rows.feed.shape, columns.feed.shape
    device = weight.device
    inner = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    # What the tiles of a row owe for errors to their left is part of their own error; what those of a column owe for
    # errors above them is not.
    target = weight.clone().view(num_rows, height, num_in)
    owed = torch.zeros(num_columns, num_out, width, device=device)
    result = torch.empty_like(target)
    for diagonal in range(num_rows + num_columns - 1):
        first, last = max(diagonal - num_columns + 1, 0), min(diagonal, num_rows - 1)
        row = torch.arange(first, last + 1, device=device)
        column = diagonal - row
        places = row[:, None, None], inner[0], (column[:, None] * width + inner[1])[:, None]
        above = owed.view(num_columns, num_rows, height, width)[column, row]
        wanted = target[places]
        tiles = quantize(row, column, wanted + above)
        result[places] = tiles
        target[row] -= (wanted - tiles) @ columns.feed[column]
        owed[column] -= rows.feed[row].mT @ (wanted + above - tiles)
    return result.view_as(weight)
