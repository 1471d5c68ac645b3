"""Quantization a block of columns at a time, each with the errors of those before it fed in (LDLQ, GPTQ).

GPTQ (arXiv:2210.17323) with blocks for columns, as QTIP (arXiv:2406.11235) does it. Any quantizer of columns will do.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Block(NamedTuple):
    """Columns to be quantized, and the metric of their errors after compensation by the columns that follow."""

    columns: slice
    target: Float[Tensor, "out size"]
    metric: Float[Tensor, "size size"]


def quantize_with_feedback(
    weight: Float[Tensor, "out in"],
    factor: Float[Tensor, "in in"],
    block_size: int,
    quantize: Callable[[Block], Float[Tensor, "out size"]],
) -> Float[Tensor, "out in"]:
    """Quantize blocks of columns from first to last, and move the error of each into those after it.

    Args:
        weight: W.
        factor: upper triangular U with `U^T U` the inverse of H, the metric of the errors.
        block_size: columns of a block; the last one may have fewer.
        quantize: returns the quantized values of a block's target.

    Returns:
        The quantized blocks, side by side.
    """
    target, quantized = weight.clone(), torch.empty_like(weight)
    num_columns = weight.shape[1]
    for start in range(0, num_columns, block_size):
        stop = min(start + block_size, num_columns)
        identity = torch.eye(stop - start, device=weight.device, dtype=factor.dtype)
        inverse = torch.linalg.solve_triangular(factor[start:stop, start:stop], identity, upper=True)
        block = Block(slice(start, stop), target[:, start:stop], inverse @ inverse.T)
        quantized[:, start:stop] = quantize(block)
        error = (block.target - quantized[:, start:stop]) @ inverse
        target[:, stop:] -= error @ factor[start:stop, stop:]
    return quantized
