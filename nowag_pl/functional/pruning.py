"""Scores and masks for pruning. A mask is `keep`: True where a weight stays.

Equal scores are settled by position: the weight that comes first in its row (for the whole matrix: in row-major
order) is kept. NoWag-P is arXiv:2504.14569; Wanda is arXiv:2306.11695.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def nowag_scores(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """Return NoWag-P's importance `h_j W_bar_ij^2`.

    Args:
        weight: normalised weight W_bar.
        second_moment: h, mean of the squared input of each column.
    """
    return weight.float().square() * second_moment


def wanda_scores(weight: Float[Tensor, "out in"], second_moment: Float[Tensor, "in"]) -> Float[Tensor, "out in"]:
    """Return Wanda's importance `|W_ij| sqrt(h_j)`.

    Args:
        weight: weight, not normalised.
        second_moment: h, mean of the squared input of each column.
    """
    return weight.float().abs() * second_moment.sqrt()


def keep_largest(scores: Float[Tensor, "rows columns"], sparsity: float) -> Bool[Tensor, "rows columns"]:
    """Keep the largest scores of each row.

    For a comparison over a whole matrix give it as one row: `scores.view(1, -1)`.

    Args:
        scores: importance of each weight.
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
    threshold = scores.kthvalue(num_removed, dim=1, keepdim=True).values
    keep = scores > threshold
    num_ties_kept = scores.shape[1] - num_removed - keep.sum(dim=1, keepdim=True)
    if num_ties_kept.any():
        ties = scores == threshold
        keep = keep | (ties & (ties.cumsum(dim=1) <= num_ties_kept))
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
    num_kept, group_size = pattern
    if scores.shape[1] % group_size:
        raise ValueError(
            f"Expected a number of input features divisible by {group_size} for the pattern {num_kept}:{group_size}, "
            f"but got {scores.shape[1]}."
        )
    members = scores.reshape(-1, group_size).unbind(dim=1)  # M tensors [groups]
    keep = torch.empty(members[0].shape[0], group_size, dtype=torch.bool, device=scores.device)
    for j, score in enumerate(members):
        rank = torch.zeros_like(score, dtype=torch.int16)  # how many of the group go before this one
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
    summed = scores.sum(dim=1 - dim, dtype=torch.float64).float()
    keep = keep_largest(summed[None], sparsity)[0]
    return (keep[:, None] if dim == 0 else keep[None, :]).expand(scores.shape).contiguous()


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"Expected sparsity (the fraction removed) in [0, 1), but got {sparsity}.")


def check_pattern(pattern: tuple[int, int]) -> None:
    """Raise ValueError unless the pattern is (N, M) with 1 <= N <= M."""
    num_kept, group_size = pattern
    if not 1 <= num_kept <= group_size:
        raise ValueError(
            f"Expected a pattern (N, M), N kept of every M weights, with 1 <= N <= M, but got {tuple(pattern)}."
        )
