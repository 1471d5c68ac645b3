"""Products with block-diagonal matrices, of which only the blocks are held, `[blocks, size, size]`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def largest_block(num_features: int, at_most: int, multiple_of: int = 1) -> int:
    """Return the size of equal blocks: the largest divisor of `num_features` that is not above `at_most`.

    Args:
        num_features: length that the blocks fill exactly.
        at_most: largest allowed size.
        multiple_of: divisor that the size must have.

    Raises:
        ValueError: there is no such size.

    Example:
        >>> largest_block(4096, 128), largest_block(528, 32), largest_block(528, 32, multiple_of=4)
        (128, 24, 24)
        >>> largest_block(52, 32), largest_block(52, 32, multiple_of=4)
        (26, 4)
    """
    sizes = [size for size in range(multiple_of, at_most + 1, multiple_of) if num_features % size == 0]
    if not sizes:
        raise ValueError(
            f"Expected a block size of at least {multiple_of} and features divisible by {multiple_of}, but got a block "
            f"size of {at_most} for {num_features} features."
        )
    return sizes[-1]


def multiply_left(blocks: Float[Tensor, "p a a"], matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Return `A S` for a block-diagonal A.

    Args:
        blocks: blocks of A; `p a` is out.
        matrix: S.
    """
    return torch.bmm(blocks, matrix.view(*blocks.shape[:2], -1)).view(matrix.shape)


def multiply_right(matrix: Float[Tensor, "*rows in"], blocks: Float[Tensor, "q b b"]) -> Float[Tensor, "*rows in"]:
    """Return `S B` for a block-diagonal B.

    Args:
        matrix: S, with any number of leading dimensions.
        blocks: blocks of B; `q b` is in.
    """
    rows = matrix.unflatten(-1, blocks.shape[:2])  # [..., q, b]
    return torch.einsum("...qb,qbc->...qc", rows, blocks).flatten(-2)


def apply_factors(
    activations: Float[Tensor, "*batch in"],
    out_factor: Float[Tensor, "p a a"],
    core: Float[Tensor, "out in"],
    in_factor: Float[Tensor, "q b b"],
) -> Float[Tensor, "*batch out"]:
    """Return `x (A S B)^T`: B, then S, then A, without their product.

    Args:
        activations: x, any number of tokens.
        out_factor: blocks of A; `p a` is out.
        core: S, dense or semi-structured, in the type of the activations.
        in_factor: blocks of B; `q b` is in.

    Returns:
        The product in the type of the activations.
    """
    dtype = activations.dtype
    hidden = multiply_right(activations, in_factor.to(dtype).mT)  # [..., in]
    hidden = F.linear(hidden, core)  # [..., out]
    return multiply_right(hidden, out_factor.to(dtype).mT).to(dtype)
