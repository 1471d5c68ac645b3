"""Two-sided normalisation of a weight matrix (NoWag, arXiv:2504.14569, Algorithm 1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Normalized(NamedTuple):
    """A normalised weight and what restores it."""

    weight: Float[Tensor, "out in"]
    in_scale: Float[Tensor, "in"]
    out_scale: Float[Tensor, "out"]


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
    weight = weight.float()
    in_scale = _norms(weight, dim=0)
    weight = weight / in_scale
    out_scale = _norms(weight, dim=1)
    return Normalized(weight / out_scale[:, None], in_scale, out_scale)


def denormalize(
    weight: Float[Tensor, "out in"], in_scale: Float[Tensor, "in"], out_scale: Float[Tensor, "out"]
) -> Float[Tensor, "out in"]:
    """Undo :func:`normalize`: `W[i, j] = r2_i W_bar[i, j] r1_j`.

    Args:
        weight: normalised (and perhaps compressed) weight.
        in_scale: r1.
        out_scale: r2.
    """
    return weight * in_scale * out_scale[:, None]


def _norms(weight: Tensor, dim: int) -> Tensor:
    """Return Euclidean norms in float32, 1 where they are zero; float64 inside, so that squares cannot overflow."""
    norms = torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64).float()
    return torch.where(norms > 0, norms, torch.ones_like(norms))
