"""A vector-quantized weight and its subvectors (NoWag-VQ, arXiv:2504.14569)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.chunks import fill_rows
from nowag_pl.functional.normalization import denormalize, normalize_rows


class Quantized(NamedTuple):
    """The parts of `r2_i codebook[codes_i] r1`."""

    codebook: Float[Tensor, "k d"]
    codes: Int[Tensor, "out groups"]
    in_scale: Float[Tensor, " in"]
    out_scale: Float[Tensor, " out"]

    @property
    def normalized(self) -> Tensor:
        """The reconstruction of the normalised weight, `[out, in]`."""
        return joined(self.codebook[self.codes], len(self.in_scale))

    @property
    def weight(self) -> Tensor:
        """The reconstruction `[out, in]`."""
        return denormalize(self.normalized, self.in_scale, self.out_scale)

    def codewords(self, columns: slice) -> Tensor:
        """Return the codewords with the scales of some columns, `[k, width]`, without those of the rows.

        Args:
            columns: one group of columns; the last one of a row may be narrower than the codewords.
        """
        return self.codebook[:, : columns.stop - columns.start] * self.in_scale[columns]


def grouped(values: Float[Tensor, "*rows in"], dim: int) -> Float[Tensor, "*rows groups d"]:
    """Cut each row into subvectors; the last of a row is filled up with zeros.

    Args:
        values: rows.
        dim: d.
    """
    return F.pad(values, (0, -values.shape[-1] % dim)).unflatten(-1, (-1, dim))


def joined(groups: Float[Tensor, "out groups d"], num_features: int) -> Float[Tensor, "out in"]:
    """Undo :func:`grouped`.

    Args:
        groups: subvectors of each row.
        num_features: length of a row without the zeros at its end.
    """
    return groups.flatten(1)[:, :num_features]


def subvectors(matrix: Float[Tensor, "out in"], dim: int) -> Float[Tensor, "n d"]:
    """Return the subvectors of all rows (:func:`grouped`), one after the other.

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
    return grouped(matrix, dim).flatten(0, 1)


def normalized_subvectors(
    weight: Float[Tensor, "out in"], in_scale: Float[Tensor, " in"], out_scale: Float[Tensor, " out"], dim: int
) -> Float[Tensor, "n d"]:
    """Return the :func:`subvectors` of the normalised weight, of which no other copy is made.

    Args:
        weight: matrix of any floating type.
        in_scale: r1.
        out_scale: r2.
        dim: d.
    """
    num_rows, num_features = weight.shape
    padded = in_scale.new_empty(num_rows, num_features + -num_features % dim)
    fill_rows(padded, lambda rows: grouped(normalize_rows(weight[rows], in_scale, out_scale[rows]), dim).flatten(1))
    return padded.view(-1, dim)


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
    rows: Float[Tensor, " out"] | None = None

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
