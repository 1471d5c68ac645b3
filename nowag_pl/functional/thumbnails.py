"""Reductions of matrices and point clouds to a size for viewing."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Smaller values show as if they were this far below the largest.
_DECADES = 12


def downsample(matrix: Float[Tensor, "rows columns"], max_size: int) -> Float[Tensor, "small_rows small_columns"]:
    """Average a matrix over cells, so that neither side is longer than `max_size`.

    Args:
        matrix: any values.
        max_size: longest side of the result; a side that is not longer does not change.

    Raises:
        ValueError: `max_size` is below 1.

    Example:
        >>> import torch
        >>> downsample(torch.tensor([[1.0, 3.0, 5.0, 7.0]]), 2).tolist()
        [[2.0, 6.0]]
    """
    if max_size < 1:
        raise ValueError(f"Expected max_size of at least 1, but got {max_size}.")
    size = (min(matrix.shape[0], max_size), min(matrix.shape[1], max_size))
    return F.adaptive_avg_pool2d(matrix[None].float(), size)[0]


def log_scale(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `log10` of values of at least 0; zeros become 12 decades below the largest value.

    Args:
        values: at least 0.

    Example:
        >>> import torch
        >>> log_scale(torch.tensor([100.0, 1.0, 0.0])).tolist()
        [2.0, 0.0, -10.0]
    """
    largest = values.max().clamp(min=torch.finfo(values.dtype).tiny).double()
    return values.double().clamp(min=largest * 10.0**-_DECADES).log10().to(values.dtype)


def sample(values: Float[Tensor, "*shape"], count: int) -> Float[Tensor, " few"]:
    """Return at most `count` values at even distances in row-major order.

    Args:
        values: any shape.
        count: at least 1.

    Example:
        >>> import torch
        >>> sample(torch.arange(6.0).view(2, 3), 3).tolist()
        [0.0, 2.0, 4.0]
    """
    flat = values.reshape(-1)
    return flat[even_indices(len(flat), count)]


def even_indices(length: int, count: int) -> Int[Tensor, " few"]:
    """Return at most `count` indices under `length`, increasing, at even distances, the first among them.

    Args:
        length: number of things.
        count: at least 1.
    """
    few = min(length, count)
    return torch.arange(few) * length // max(few, 1)


def principal_axes(
    points: Float[Tensor, "n d"], num_axes: int = 2
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d axes"]]:
    """Return the centre of points and the directions of their largest variance (principal component analysis).

    Args:
        points: at least one.
        num_axes: directions, at most d.

    Returns:
        The mean `[d]`, and orthonormal axes `[d, axes]`, the one of the largest variance first; of both signs, the one
        whose largest coordinate is positive.

    Raises:
        ValueError: there are no points, or not so many axes.
    """
    if not len(points) or not 1 <= num_axes <= points.shape[1]:
        raise ValueError(f"Expected points of at least {num_axes} coordinates, but got shape {tuple(points.shape)}.")
    points = points.double()
    mean = points.mean(dim=0)
    centred = points - mean
    # Eigenvalues ascend.
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :num_axes]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return mean.float(), (axes * largest.sign()).float()
