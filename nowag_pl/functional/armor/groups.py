"""The discrete step of ARMOR (arXiv:2510.05528): new supports and values for one group of M weights per block pair.

`(A S B)_pq = A_p S_pq B_q`: a block of W_bar depends on one pair of an A-block and a B-block only, so that the groups
of all pairs are solved at once. With a the column of A_p that multiplies the group's row, B_J the rows of B_q that its
columns multiply and E the residual without the group, its values s cost `||E - a s B_J||^2`, weighted by u and h. This
is `s^T G s - 2 c^T s` and a constant, `G = (a^T U a) B_J H B_J^T`, `c = B_J H E^T U a`; for each of the C(M, N)
supports the best s solves an N x N system.
"""

from itertools import combinations
from math import comb
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.armor.objective import ArmorFactors, ArmorTarget

# Supports of a group, all of which are solved for.
MAX_SUPPORTS = 256
# Share of the mean of G's diagonal: channels without activations make G singular.
_DAMPING = 1e-6


class Groups(NamedTuple):
    """A group of every block pair: its row within the A-block, and its number in the row of the B-block."""

    row: Int[Tensor, "p q"]
    number: Int[Tensor, "p q"]


class _Quadratic(NamedTuple):
    """The objective as a function of a group's values, `s^T G s - 2 c^T s`, and the factors of the values."""

    gram: Tensor  # G, [p, q, m, m]
    linear: Tensor  # c, [p, q, m]
    column: Tensor  # a, [p, q, a]
    rows: Tensor  # B_J, [p, q, m, b]

    def gain(self, values: Tensor) -> Tensor:
        """Return the decrease of the objective by values `[p, q, m]` from that of zeros, `[p, q]`."""
        return (values * (2 * self.linear - _times(self.gram, values))).sum(dim=-1)


def supports_of(pattern: tuple[int, int]) -> Int[Tensor, "supports n"]:
    """Return the positions that each support of an N:M group keeps, in lexicographic order.

    Raises:
        ValueError: there are more than 256.
    """
    num_kept, group_size = pattern
    if comb(group_size, num_kept) > MAX_SUPPORTS:
        raise ValueError(
            f"Expected a pattern with at most {MAX_SUPPORTS} ways to keep N of M, but got {tuple(pattern)} with "
            f"{comb(group_size, num_kept)}."
        )
    return torch.tensor(list(combinations(range(group_size), num_kept)))


def choose_groups(
    factors: ArmorFactors,
    group_size: int,
    generator: torch.Generator,
    gradient: Float[Tensor, "out in"] | None = None,
) -> Groups:
    """Draw a group of every block pair.

    Args:
        factors: A, S and B.
        group_size: M.
        generator: on the CPU, so that every device draws the same.
        gradient: of the objective by S; groups are drawn in proportion to its squared norm. None: evenly.
    """
    (num_rows, row_size), (num_columns, column_size) = factors.out_factor.shape[:2], factors.in_factor.shape[:2]
    per_row = column_size // group_size
    draws = torch.rand(num_rows, num_columns, generator=generator).to(factors.core.device)
    if gradient is None:
        chosen = (draws * row_size * per_row).long()
    else:
        norms = _grouped(gradient.square(), factors, group_size).sum(dim=-1)  # [p, row_size, q, per_row]
        summed = norms.transpose(1, 2).flatten(2).cumsum(dim=-1)
        chosen = torch.searchsorted(summed, (draws * summed[..., -1])[..., None], right=True).squeeze(-1)
    chosen = chosen.clamp(max=row_size * per_row - 1)
    return Groups(chosen // per_row, chosen % per_row)


def improve_groups(
    target: ArmorTarget,
    factors: ArmorFactors,
    residual: Float[Tensor, "out in"],
    groups: Groups,
    supports: Int[Tensor, "supports n"],
    group_size: int,
) -> tuple[ArmorFactors, Float[Tensor, "out in"]]:
    """Give each group the support and values of least objective, everything else fixed.

    A group does not change if nothing better is found.

    Args:
        target: the weight to approximate, and the weights of its errors.
        factors: A, S and B.
        residual: W_bar - A S B.
        groups: a group of every block pair.
        supports: positions that each support keeps.
        group_size: M.

    Returns:
        New factors and their residual.
    """
    before = _grouped(factors.core, factors, group_size)[_index(groups)]  # [p, q, m]
    keep_before = _grouped(factors.keep, factors, group_size)[_index(groups)]
    objective = _quadratic(target, factors, residual, groups, before)
    values, keep = _best(objective, supports)
    better = (objective.gain(values) > objective.gain(before))[..., None]
    values, keep = torch.where(better, values, before), torch.where(better, keep, keep_before)
    change = ((values - before)[..., None, :] @ objective.rows).squeeze(-2)  # [p, q, b]
    blocks = residual.view(*factors.out_factor.shape[:2], *factors.in_factor.shape[:2])  # [p, a, q, b]
    moved = torch.addcmul(blocks, objective.column.mT[..., None], change[:, None], value=-1)
    core, mask = factors.core.clone(), factors.keep.clone()
    _grouped(core, factors, group_size)[_index(groups)] = values
    _grouped(mask, factors, group_size)[_index(groups)] = keep
    return factors._replace(core=core, keep=mask), moved.view(residual.shape)


def _quadratic(
    target: ArmorTarget, factors: ArmorFactors, residual: Tensor, groups: Groups, before: Tensor
) -> _Quadratic:
    """Return the objective by the values of each group, which now are `before` `[p, q, m]`."""
    num_rows, num_columns = groups.row.shape
    pair_row, pair_column = _pairs(groups)
    column = factors.out_factor.mT[pair_row, groups.row]  # [p, q, a]
    rows = factors.in_factor.unflatten(1, (-1, before.shape[-1]))[pair_column, groups.number]  # [p, q, m, b]
    weighted_column = column * target.row_weights.view(num_rows, 1, -1)
    weighted_rows = rows * target.column_weights.view(num_columns, 1, -1)
    gram = (weighted_rows @ rows.mT) * (weighted_column * column).sum(dim=-1)[..., None, None]
    blocks = residual.view(num_rows, -1, num_columns, rows.shape[-1])  # [p, a, q, b]
    projected = torch.einsum("paqb,pqa->pqb", blocks, weighted_column)
    # The residual lacks the group's present part.
    linear = _times(weighted_rows, projected) + _times(gram, before)
    return _Quadratic(gram, linear, column, rows)


def _best(objective: _Quadratic, supports: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values and the mask `[p, q, m]` of the best support of each group."""
    gram, linear = objective.gram, objective.linear
    damping = _DAMPING * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + torch.finfo(gram.dtype).tiny
    damped = gram + damping[..., None, None] * torch.eye(gram.shape[-1], device=gram.device)
    systems = damped[..., supports[:, :, None], supports[:, None, :]]  # [p, q, supports, n, n]
    solutions, _ = torch.linalg.solve_ex(systems, linear[..., supports])  # [p, q, supports, n]
    shape = (*solutions.shape[:-1], gram.shape[-1])
    positions = supports.expand(solutions.shape)
    values = linear.new_zeros(shape).scatter(-1, positions, solutions)  # [p, q, supports, m]
    keep = torch.zeros(shape, dtype=torch.bool, device=gram.device).scatter(-1, positions, True)
    gains = (values * (2 * linear[..., None, :] - values @ gram)).sum(dim=-1)
    best = gains.argmax(dim=-1)[..., None, None].expand(*gains.shape[:-1], 1, shape[-1])
    return values.gather(-2, best).squeeze(-2), keep.gather(-2, best).squeeze(-2)


def _grouped(matrix: Tensor, factors: ArmorFactors, group_size: int) -> Tensor:
    """View a matrix `[out, in]` as `[p, row_size, q, per_row, m]`."""
    return matrix.view(*factors.out_factor.shape[:2], len(factors.in_factor), -1, group_size)


def _index(groups: Groups) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the places of groups in the result of :func:`_grouped`."""
    pair_row, pair_column = _pairs(groups)
    return pair_row, groups.row, pair_column, groups.number


def _pairs(groups: Groups) -> tuple[Tensor, Tensor]:
    """Return the numbers of the A-block `[p, 1]` and of the B-block `[1, q]` of each pair."""
    num_rows, num_columns = groups.row.shape
    device = groups.row.device
    return torch.arange(num_rows, device=device)[:, None], torch.arange(num_columns, device=device)[None]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply each matrix `[..., m, n]` with its vector `[..., n]`."""
    return (matrices @ vectors[..., None]).squeeze(-1)
