"""Scores and masks for pruning. A mask is `keep`: True where a weight stays.

Equal scores are settled by position: the weight that comes first in its row (for the whole matrix: in row-major
order) is kept. NoWag-P is arXiv:2504.14569; Wanda is arXiv:2306.11695.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nowag_pl.functional import chunks
from nowag_pl.functional.chunks import empty_like, fill_rows, row_chunks
from nowag_pl.functional.normalization import column_norms, normalize_rows, norms
from nowag_pl.functional.patterns import check_pattern, check_row
from nowag_pl.functional.thresholds import kth_smallest, mark_largest
from nowag_pl.kernels.dispatch import is_for_numba


def nowag_scores(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Return NoWag-P's importance `h_j W_bar_ij^2`.

    Args:
        weight: normalised weight W_bar.
        second_moment: h, mean of the squared input of each column.
    """
    return weight.float().square() * second_moment


def normalized_scores(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Return :func:`nowag_scores` of a weight that is not normalised yet; the normalised weight is not held.

    Args:
        weight: weight of any floating type.
        second_moment: h, mean of the squared input of each column.
    """
    scores = empty_like(weight, torch.float32)
    if is_for_numba(weight.device, weight.numel()):
        from nowag_pl.kernels.cpu.normalization import write_scores

        in_scale = column_norms(weight)
        for rows in row_chunks(*weight.shape):
            write_scores(weight[rows].detach().float(), in_scale, second_moment, scores[rows])
        return scores
    in_scale, out_scale = norms(weight)
    return fill_rows(
        scores, lambda rows: nowag_scores(normalize_rows(weight[rows], in_scale, out_scale[rows]), second_moment)
    )


def wanda_scores(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, " in"]) -> Float[Tensor, "out in"]:
    """Return Wanda's importance `|W_ij| sqrt(h_j)`.

    Args:
        weight: weight, not normalised.
        second_moment: h, mean of the squared input of each column.
    """
    roots = second_moment.sqrt()
    return fill_rows(empty_like(weight, torch.float32), lambda rows: weight[rows].float().abs() * roots)


def keep_largest(scores: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
    """Keep the largest scores of each row.

    For a comparison over a whole matrix give it as one row: `scores.view(1, -1)`.

    Args:
        scores: importance of each weight, compared in float32.
        sparsity: fraction of each row to remove, in [0, 1).

    Returns:
        A mask in which exactly `round(sparsity * columns)` weights of each row are removed.

    Raises:
        ValueError: `sparsity` is outside of [0, 1).

    Example:
        >>> import torch
        >>> keep_largest(torch.tensor([[3.0, 1.0, 2.0, 1.0]]), sparsity=0.25).tolist()
        [[True, True, True, False]]
    """
    check_sparsity(sparsity)
    num_removed = round(sparsity * scores.shape[1])
    if num_removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.float()
    keep = empty_like(scores, torch.bool)
    if len(scores) == 1 and mark_largest(scores[0], num_removed, keep[0]):
        return keep
    if scores.shape[1] <= chunks.CHUNK_ELEMENTS:
        return fill_rows(keep, lambda rows: _keep_in_rows(scores[rows], num_removed))
    for row, keep_row in zip(scores, keep, strict=True):
        _keep_in_long_row(row, num_removed, keep_row)
    return keep


def keep_n_of_m(scores: Float[Tensor, "out in"], pattern: tuple[int, int]) -> Bool[Tensor, "out in"]:
    """Keep the N largest scores of every M consecutive weights of a row.

    Args:
        scores: importance of each weight.
        pattern: (N, M): N kept of every M.

    Raises:
        ValueError: not 1 <= N <= M, or M does not divide the row.

    Example:
        >>> import torch
        >>> keep_n_of_m(torch.tensor([[1.0, 4.0, 2.0, 3.0]]), pattern=(1, 4)).tolist()
        [[False, True, False, False]]
    """
    check_pattern(pattern)
    check_row(scores.shape[1], pattern)
    num_kept, group_size = pattern
    if is_for_numba(scores.device, scores.numel()):
        from nowag_pl.kernels.cpu.pruning import GROUP_SIZES, mark_groups

        if group_size in GROUP_SIZES:
            return mark_groups(scores.float(), num_kept, group_size)
    return fill_rows(empty_like(scores, torch.bool), lambda rows: _keep_in_groups(scores[rows], num_kept, group_size))


def _keep_in_rows(scores: Tensor, num_removed: int) -> Tensor:
    """Return the mask of rows `[rows, columns]` that are compared each for itself."""
    if scores.device.type == "cpu":
        # NumPy's partition is ten times as fast as kthvalue.
        ordered = np.partition(scores.numpy(), num_removed - 1, axis=1)
        threshold = torch.from_numpy(ordered[:, num_removed - 1 : num_removed])
    else:
        threshold = scores.kthvalue(num_removed, dim=1, keepdim=True).values
    keep = scores > threshold
    num_ties_kept = scores.shape[1] - num_removed - keep.sum(dim=1, keepdim=True)
    if num_ties_kept.any():
        ties = scores == threshold
        keep = keep | (ties & (ties.cumsum(dim=1) <= num_ties_kept))
    return keep


def _keep_in_long_row(scores: Tensor, num_removed: int, keep: Tensor) -> None:
    """Fill the mask `[columns]` of one row in chunks of columns."""
    threshold = kth_smallest(scores, num_removed)
    parts = scores.split(chunks.CHUNK_ELEMENTS)
    num_ties_kept = len(scores) - num_removed - sum(int(torch.count_nonzero(part > threshold)) for part in parts)
    for part, keep_part in zip(parts, keep.split(chunks.CHUNK_ELEMENTS), strict=True):
        ties = part == threshold
        keep_part.copy_((part > threshold) | (ties & (ties.cumsum(dim=0) <= num_ties_kept)))
        num_ties_kept = max(num_ties_kept - int(ties.sum()), 0)


def _keep_in_groups(scores: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return the mask of rows `[rows, columns]` in whole groups."""
    members = scores.reshape(-1, group_size).unbind(dim=1)  # M tensors [groups]
    keep = torch.empty(members[0].shape[0], group_size, dtype=torch.bool, device=scores.device)
    for j, score in enumerate(members):
        # The number of scores in the group that go before this one.
        rank = torch.zeros_like(score, dtype=torch.int16)
        for i, other in enumerate(members):
            if i != j:
                rank += (other >= score) if i < j else (other > score)
        keep[:, j] = rank < num_kept
    return keep.view(scores.shape)


def keep_structured(scores: Float[Tensor, "out in"], sparsity: float, dim: int) -> Bool[Tensor, "out in"]:
    """Keep whole rows or columns with the largest summed scores.

    Args:
        scores: importance of each weight.
        sparsity: fraction of rows or columns to remove, in [0, 1).
        dim: 0 to keep or remove rows (output channels), 1 for columns (input channels).

    Raises:
        ValueError: `sparsity` is outside of [0, 1).
    """
    sums = [scores[rows].sum(dim=1 - dim, dtype=torch.float64) for rows in row_chunks(*scores.shape)]
    summed = torch.cat(sums) if dim == 0 else torch.stack(sums).sum(dim=0)
    keep = keep_largest(summed.float()[None], sparsity)[0]
    return (keep[:, None] if dim == 0 else keep[None, :]).expand(scores.shape).contiguous()


def kept_values(weight: Shaped[Tensor, "out in"], keep: Bool[Tensor, "out in"]) -> Shaped[Tensor, " num_kept"]:
    """Return the weights that a mask keeps, in row-major order.

    Args:
        weight: dense weight.
        keep: mask, True where a weight is kept.
    """
    if is_for_numba(weight.device, weight.numel()):
        from nowag_pl.kernels.cpu.pruning import pick

        return pick(weight.flatten(), keep.flatten())
    values = weight.new_empty(int(keep.count_nonzero()))
    start = 0
    for rows in row_chunks(*weight.shape):
        part = weight[rows][keep[rows]]
        values[start : start + len(part)] = part
        start += len(part)
    return values


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity (the fraction removed) in [0, 1), but got {sparsity}.")
