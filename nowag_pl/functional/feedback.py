"""Quantization with error feedback, a block of columns at a time (GPTQ, arXiv:2210.17323), for any quantizer.

The error that counts is that of the linear's output, `sum_i (w_i - q_i) H (w_i - q_i)^T` over the rows i, with H the
mean of x x^T. Once a block of columns is quantized, the best that the columns after it can do about its error e is to
change by `-e D U`, where U is the rows of the block in the upper triangular factor of H's inverse, and D the inverse of
the factor's diagonal block. Given that, the error of the block itself costs `e D D^T e^T`.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Quantize = Callable[[slice, Tensor, Tensor], Tensor]
"""Quantizes a block: columns, target `[out, width]` and metric M `[width, width]` to a reconstruction `[out, width]`.

The smaller `(t_i - q_i) M (t_i - q_i)^T` of every row, the better.
"""


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
