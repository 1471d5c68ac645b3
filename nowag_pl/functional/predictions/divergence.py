"""How well a model predicts tokens, and how far its predictions are from another model's.

All are computed in float32 from logits of any floating type, in tiles of positions and vocabulary, so that nothing as
large as the logits is made of them, and summed in float64.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

TILE_POSITIONS = 64
TILE_WORDS = 2**15  # 8 MiB in float32 with the positions


def log_normalizer(
    logits: Float[Tensor, "tokens vocabulary"], tile_words: int = TILE_WORDS
) -> Float[Tensor, " tokens"]:
    """Return `log sum_v exp(logits_v)` of each position, float64.

    Args:
        logits: unnormalised predictions.
        tile_words: words of the vocabulary computed at a time.

    Example:
        >>> import torch
        >>> [round(value, 4) for value in log_normalizer(torch.zeros(2, 8)).tolist()]  # ln 8
        [2.0794, 2.0794]
    """
    largest = logits.amax(dim=-1, keepdim=True).float()
    total = torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
    for words in logits.split(tile_words, dim=-1):
        total = total + (words.float() - largest).exp_().sum(dim=-1)
    return largest[:, 0] + total.log()


def negative_log_likelihood(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    tile: tuple[int, int] = (TILE_POSITIONS, TILE_WORDS),
) -> Float[Tensor, ""]:
    """Sum the negative log likelihood of `targets`.

    Args:
        logits: unnormalised predictions.
        targets: the token that came at each position.
        tile: positions and words computed at a time.

    Returns:
        Sum over tokens in nats, float64.

    Example:
        >>> import torch
        >>> round(negative_log_likelihood(torch.zeros(3, 8), torch.tensor([1, 2, 3])).item(), 4)  # 3 ln 8
        6.2383
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows in _rows(logits, tile[0]):
        chosen = logits[rows].gather(1, targets[rows, None].long())[:, 0]
        total = total + (log_normalizer(logits[rows], tile[1]) - chosen.double()).sum()
    return total


def kl_divergence(
    reference_logits: Float[Tensor, "tokens vocabulary"],
    logits: Float[Tensor, "tokens vocabulary"],
    tile: tuple[int, int] = (TILE_POSITIONS, TILE_WORDS),
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    r"""Sum the Kullback-Leibler divergence from a reference model, and count equal first choices.

    For each position `sum_v p_v (log p_v - log q_v)` with p the reference's and q the other model's distribution; with
    logits a, b and their normalizers A, B, `sum_v p_v (a_v - b_v) - (A - B)`.

    Args:
        reference_logits: predictions of the reference (the dense model).
        logits: predictions of the model under test.
        tile: positions and words computed at a time.

    Returns:
        Divergence summed over positions in nats, float64; number of positions at which both models prefer the same
        token.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    agreements = torch.zeros((), dtype=torch.int64, device=logits.device)
    for rows in _rows(logits, tile[0]):
        reference, other = reference_logits[rows], logits[rows]
        normalizer = log_normalizer(reference, tile[1])
        of_reference = normalizer.float()[:, None]
        for words, other_words in zip(reference.split(tile[1], -1), other.split(tile[1], -1), strict=True):
            probabilities = (words.float() - of_reference).exp_()
            total = total + (probabilities * (words.float() - other_words.float())).sum(dim=-1).double().sum()
        total = total - (normalizer - log_normalizer(other, tile[1])).sum()
        agreements = agreements + (reference.argmax(-1) == other.argmax(-1)).sum()
    return total, agreements


def _rows(logits: Tensor, size: int) -> Iterator[slice]:
    for start in range(0, len(logits), size):
        yield slice(start, start + size)
