"""Rotation of a weight by random signs and an orthogonal matrix, which makes its entries nearly Gaussian.

The incoherence processing of QuIP# (arXiv:2402.04396) and QTIP (arXiv:2406.11235). The matrix has Hadamard blocks, as
in the EXL3 format: the block's size is the largest power of two up to 128 that divides the size of the weight. "both"
stops there, on both sides of the weight; "full" mixes the blocks as well, by a Hartley matrix of their number, which
every number has. Attention needs it: its heads, of very unequal importance, often are the blocks.
"""

from functools import lru_cache
from math import gcd, pi, sqrt
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

MAX_BLOCK = 128
Rotation = Literal["full", "both", "none"]


def hadamard_block(size: int) -> int:
    """Return the size of the blocks for a number of rows or columns.

    Args:
        size: rows or columns.

    Example:
        >>> [hadamard_block(size) for size in (4096, 576, 48, 7)]
        [128, 64, 16, 1]
    """
    return gcd(size, MAX_BLOCK)


def mixed(matrix: Float[Tensor, "*rows size"], rotation: Rotation) -> Float[Tensor, "*rows size"]:
    """Multiply rows by an orthonormal, symmetric matrix, so that twice is once undone.

    Args:
        matrix: rows.
        rotation: "both" for Hadamard blocks (Sylvester's), "full" for their mixture, "none" for no change.

    Example:
        >>> import torch
        >>> mixed(torch.tensor([[1.0, 1.0]]), "both").tolist()
        [[1.4142135381698608, 0.0]]
    """
    if rotation == "none":
        return matrix
    block = hadamard_block(matrix.shape[-1])
    # As a product it takes a tenth of the time of sums and differences, which pass through memory seven times.
    blocks = (matrix.unflatten(-1, (-1, block)) @ _sylvester(block).to(matrix)) / sqrt(block)
    if rotation == "full":
        blocks = _hartley(blocks.shape[-2]).to(matrix) @ blocks
    return blocks.flatten(-2)


@lru_cache
def _sylvester(size: int) -> Tensor:
    """Return the matrix of ones and minus ones; their signs are the parity of the common bits of row and column."""
    # It is kept, and so must not be of the mode or on the device that happen to be set when it is first needed.
    with torch.inference_mode(False):
        numbers = torch.arange(size, device="cpu")
        common = numbers & numbers[:, None]
        parity = sum(((common >> bit) & 1 for bit in range(1, size.bit_length())), common & 1) & 1
        return 1.0 - 2.0 * parity


@lru_cache
def _hartley(size: int) -> Tensor:
    """Return the matrix of `(cos a + sin a) / sqrt(size)` at the angles `a = 2 pi row column / size`."""
    with torch.inference_mode(False):
        numbers = torch.arange(size, device="cpu", dtype=torch.float64)
        # Whole turns are left out, so that large products lose no digits.
        angles = 2 * pi * (numbers * numbers[:, None] % size) / size
        return ((angles.cos() + angles.sin()) / sqrt(size)).float()


def random_signs(size: int, generator: torch.Generator, device: torch.device) -> Float[Tensor, " size"]:
    """Return ones and minus ones, drawn on the generator's device.

    Args:
        size: number of signs.
        generator: source of randomness.
        device: where they go.
    """
    drawn = torch.randint(0, 2, (size,), generator=generator, device=generator.device)
    return (2 * drawn - 1).to(device, torch.float32)


def rotate(
    weight: Float[Tensor, "out in"],
    out_signs: Float[Tensor, " out"],
    in_signs: Float[Tensor, " in"],
    rotation: Rotation,
) -> Float[Tensor, "out in"]:
    """Return `R_out S_out W S_in R_in`.

    Args:
        weight: W.
        out_signs: diagonal of S_out.
        in_signs: diagonal of S_in.
        rotation: kind of R.
    """
    return mixed(mixed(weight * in_signs, rotation).T.contiguous() * out_signs, rotation).T.contiguous()


def rotate_back(
    weight: Float[Tensor, "out in"],
    out_signs: Float[Tensor, " out"],
    in_signs: Float[Tensor, " in"],
    rotation: Rotation,
) -> Float[Tensor, "out in"]:
    """Undo :func:`rotate`.

    Args:
        weight: rotated weight.
        out_signs: diagonal of S_out, or any scales of rows that are to be multiplied afterwards.
        in_signs: diagonal of S_in, or any scales of columns.
        rotation: kind of R.
    """
    return mixed(mixed(weight, rotation).T.contiguous(), rotation).T * out_signs[:, None] * in_signs


def rotate_metric(
    second_moment: Float[Tensor, "in in"], in_scale: Float[Tensor, " in"], rotation: Rotation
) -> Float[Tensor, "in in"]:
    """Return `R D H D R`, the metric of a rotated weight's error that corresponds to H for the weight itself.

    Args:
        second_moment: H, mean of x x^T.
        in_scale: diagonal of D, the factors of the columns after the rotation: signs and column scales.
        rotation: kind of R.
    """
    scaled = second_moment * in_scale * in_scale[:, None]
    return mixed(mixed(scaled, rotation).T.contiguous(), rotation)
