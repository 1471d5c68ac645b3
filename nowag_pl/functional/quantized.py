"""A vector-quantized weight and its subvectors (NoWag-VQ, arXiv:2504.14569)."""

from math import ceil
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.normalization import denormalize


class Quantized(NamedTuple):
    """What `r2_i codebook[codes_i] r1` is made of."""

    codebook: Float[Tensor, "k d"]
    codes: Int[Tensor, "out groups"]
    in_scale: Float[Tensor, "in"]
    out_scale: Float[Tensor, "out"]

    @property
    def weight(self) -> Tensor:
        """The reconstruction `[out, in]`."""
        normalized = self.codebook[self.codes].flatten(1)[:, : len(self.in_scale)]
        return denormalize(normalized, self.in_scale, self.out_scale)


def subvectors(matrix: Float[Tensor, "out in"], dim: int) -> Float[Tensor, "n d"]:
    """Cut each row into subvectors; the last of a row is filled up with zeros.

    Args:
        matrix: `[out, in]`.
        dim: d.

    Returns:
        `[out * ceil(in / d), d]`.

    Example:
        >>> import torch
        >>> subvectors(torch.ones(1, 3), 2).tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    num_features = matrix.shape[1]
    return F.pad(matrix, (0, ceil(num_features / dim) * dim - num_features)).view(-1, dim)


def columns(num_features: int, dim: int) -> list[tuple[int, int]]:
    """Return where each subvector starts and stops in a row, without what fills it up."""
    return [(start, min(start + dim, num_features)) for start in range(0, num_features, dim)]
