"""A vector-quantized weight and its subvectors (NoWag-VQ, arXiv:2504.14569)."""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.chunks import fill_rows
from nowag_pl.functional.normalization import denormalize, normalize_rows


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


def normalized_subvectors(
    weight: Float[Tensor, "out in"], in_scale: Float[Tensor, "in"], out_scale: Float[Tensor, "out"], dim: int
) -> Float[Tensor, "n d"]:
    """Return the :func:`subvectors` of the normalised weight, of which no other copy is made.

    Args:
        weight: matrix of any floating type.
        in_scale: r1.
        out_scale: r2.
        dim: d.
    """
    num_rows, num_features = weight.shape
    padding = -num_features % dim
    padded = in_scale.new_empty(num_rows, num_features + padding)
    return fill_rows(
        padded, lambda rows: F.pad(normalize_rows(weight[rows], in_scale, out_scale[rows]), (0, padding))
    ).view(-1, dim)


@dataclass(frozen=True)
class SubvectorWeights:
    """Weights `v_i u_j` of the coordinates of a matrix's :func:`subvectors`, computed for those that are asked for.

    Args:
        columns: u, cut into subvectors, `[groups, d]`.
        rows: v, `[out]`; None where every row has the same weights.

    Example:
        >>> import torch
        >>> weights = SubvectorWeights(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1.0, 10.0]))
        >>> weights[1:3].tolist()
        [[3.0, 0.0], [10.0, 20.0]]
    """

    columns: Float[Tensor, "groups d"]
    rows: Float[Tensor, "out"] | None = None

    def __getitem__(self, selected: slice | Tensor) -> Float[Tensor, "m d"]:
        """Return the weights of some subvectors, counted row by row.

        Args:
            selected: slice with a start and a stop, or indices `[m]`.
        """
        num_groups = len(self.columns)
        if isinstance(selected, slice):
            selected = torch.arange(selected.start, selected.stop, device=self.columns.device)
        weights = self.columns[selected % num_groups]
        return weights if self.rows is None else weights * self.rows[selected // num_groups, None]


def columns(num_features: int, dim: int) -> list[tuple[int, int]]:
    """Return where each subvector starts and stops in a row, without what fills it up."""
    return [(start, min(start + dim, num_features)) for start in range(0, num_features, dim)]
