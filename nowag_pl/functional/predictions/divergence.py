"""How well a model predicts tokens, and how far its predictions are from another model's.

All are computed in float32 from logits of any floating type, in chunks of positions so that a large vocabulary does
not multiply the memory, and summed in float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_POSITIONS = 1024


def negative_log_likelihood(
    logits: Float[Tensor, "tokens vocabulary"],
    targets: Int[Tensor, " tokens"],
    chunk_positions: int = CHUNK_POSITIONS,
) -> Float[Tensor, ""]:
    """Sum the negative log likelihood of `targets`.

    Args:
        logits: unnormalised predictions.
        targets: the token that came at each position.
        chunk_positions: positions computed at a time.

    Returns:
        Sum over tokens in nats, float64.

    Example:
        >>> import torch
        >>> round(negative_log_likelihood(torch.zeros(3, 8), torch.tensor([1, 2, 3])).item(), 4)  # 3 ln 8
        6.2383
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for chunk, target in zip(logits.split(chunk_positions), targets.split(chunk_positions), strict=True):
        total = total + F.cross_entropy(chunk.float(), target.long(), reduction="none").double().sum()
    return total


def kl_divergence(
    reference_logits: Float[Tensor, "tokens vocabulary"],
    logits: Float[Tensor, "tokens vocabulary"],
    chunk_positions: int = CHUNK_POSITIONS,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    r"""Sum the Kullback-Leibler divergence from a reference model, and count equal first choices.

    For each position `sum_v p_v (log p_v - log q_v)` with p the reference's and q the other model's distribution.

    Args:
        reference_logits: predictions of the reference (the dense model).
        logits: predictions of the model under test.
        chunk_positions: positions computed at a time.

    Returns:
        Divergence summed over positions in nats, float64; number of positions at which both models prefer the same
        token.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    agreements = torch.zeros((), dtype=torch.int64, device=logits.device)
    for reference, chunk in zip(reference_logits.split(chunk_positions), logits.split(chunk_positions), strict=True):
        log_p, log_q = F.log_softmax(reference.float(), dim=-1), F.log_softmax(chunk.float(), dim=-1)
        total = total + F.kl_div(log_q, log_p, reduction="none", log_target=True).double().sum()
        agreements = agreements + (reference.argmax(-1) == chunk.argmax(-1)).sum()
    return total, agreements
