"""Two-sided normalisation of a weight matrix (NoWag, arXiv:2504.14569, Algorithm 1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.chunks import empty_like, fill_rows, row_chunks
from nowag_pl.kernels.dispatch import is_for_numba


class Normalized(NamedTuple):
    """A normalised weight and the scales that restore it."""

    weight: Float[Tensor, "out in"]
    in_scale: Float[Tensor, " in"]
    out_scale: Float[Tensor, " out"]


def normalize(weight: Float[Tensor, "out in"]) -> Normalized:
    """Divide columns, then rows, by their Euclidean norm.

    `r1_j = ||W[:, j]||`, `W' = W / r1`, `r2_i = ||W'[i, :]||`, `W_bar = W' / r2`. A zero column or row gets scale 1.

    Args:
        weight: matrix of any floating type.

    Returns:
        The normalised weight, `in_scale` (r1) and `out_scale` (r2), all float32.

    Example:
        >>> import torch
        >>> normalized = normalize(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
        >>> normalized.in_scale.tolist(), normalized.weight.tolist()
        ([5.0, 1.0], [[1.0, 0.0], [1.0, 0.0]])
    """
    in_scale, out_scale = norms(weight)
    normalized = empty_like(weight, torch.float32)
    fill_rows(normalized, lambda rows: normalize_rows(weight[rows], in_scale, out_scale[rows]))
    return Normalized(normalized, in_scale, out_scale)


def norms(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, " in"], Float[Tensor, " out"]]:
    """Return r1 and r2 of :func:`normalize`, without the normalised weight.

    Args:
        weight: matrix of any floating type.

    Returns:
        `in_scale` and `out_scale`, float32; both are 1 where they would be zero.
    """
    in_scale = column_norms(weight)
    out_scale = in_scale.new_empty(len(weight))
    compiled = is_for_numba(weight.device, weight.numel())
    for rows in row_chunks(*weight.shape):
        if compiled:
            from nowag_pl.kernels.cpu.normalization import write_row_norms

            write_row_norms(weight[rows].detach().float(), in_scale, out_scale[rows])
        else:
            scaled = weight[rows].float() / in_scale
            out_scale[rows] = _nonzero(torch.linalg.vector_norm(scaled, dim=1, dtype=torch.float64))
    return in_scale, out_scale


def column_norms(weight: Float[Tensor, "out in"]) -> Float[Tensor, " in"]:
    """Return r1 of :func:`normalize`, float32.

    Args:
        weight: matrix of any floating type.
    """
    squares = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    compiled = is_for_numba(weight.device, weight.numel())
    # Squares are summed in float64, where they cannot overflow.
    for rows in row_chunks(*weight.shape):
        if compiled:
            from nowag_pl.kernels.cpu.normalization import add_squares

            add_squares(weight[rows].detach().float(), squares)
        else:
            squares += weight[rows].double().square().sum(dim=0)
    return _nonzero(squares.sqrt())


def normalize_rows(
    weight: Float[Tensor, "rows in"], in_scale: Float[Tensor, " in"], out_scale: Float[Tensor, " rows"]
) -> Float[Tensor, "rows in"]:
    """Return some rows of the normalised weight, float32.

    Args:
        weight: rows of the weight.
        in_scale: r1.
        out_scale: r2 of these rows.
    """
    return weight.float() / in_scale / out_scale[:, None]


def denormalize(
    weight: Float[Tensor, "out in"], in_scale: Float[Tensor, " in"], out_scale: Float[Tensor, " out"]
) -> Float[Tensor, "out in"]:
    """Undo :func:`normalize`: `W[i, j] = r2_i W_bar[i, j] r1_j`.

    Args:
        weight: normalised (and perhaps compressed) weight.
        in_scale: r1.
        out_scale: r2.
    """
    return weight * in_scale * out_scale[:, None]


def _nonzero(values: Tensor) -> Tensor:
    """Return float32 values, with 1 in the place of zeros."""
    values = values.float()
    return torch.where(values > 0, values, torch.ones_like(values))
