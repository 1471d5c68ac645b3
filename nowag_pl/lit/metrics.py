"""Perplexity and divergence as torchmetrics, reduced over ranks by sums."""

import torch
from torch import Tensor
from torchmetrics import Metric

from nowag_pl.functional.predictions.divergence import kl_divergence, negative_log_likelihood


class Perplexity(Metric):
    """exp of the mean negative log likelihood over every predicted token.

    A window of `seq_len` tokens gives `seq_len - 1` predictions. The sum is kept in float64.
    """

    full_state_update = False
    higher_is_better = False
    is_differentiable = False
    total: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add positions of windows.

        Args:
            logits: `[batch, positions, vocabulary]`.
            targets: the tokens that came next, `[batch, positions]`.
        """
        self.total += negative_log_likelihood(logits.flatten(0, 1), targets.flatten())
        self.num_tokens += targets.numel()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (self.total / self.num_tokens).exp()


class Divergence(Metric):
    """Mean Kullback-Leibler divergence per predicted token from a reference model, and top-1 agreement."""

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    total: Tensor
    num_agreements: Tensor
    num_tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_agreements", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, reference_logits: Tensor, logits: Tensor) -> None:
        """Add positions of windows at which a token is predicted.

        Args:
            reference_logits: `[batch, positions, vocabulary]` of the dense model.
            logits: `[batch, positions, vocabulary]`.
        """
        total, num_agreements = kl_divergence(reference_logits.flatten(0, 1), logits.flatten(0, 1))
        self.total += total
        self.num_agreements += num_agreements
        self.num_tokens += logits.shape[0] * logits.shape[1]

    def compute(self) -> dict[str, Tensor]:
        """Return `kl_divergence` in nats per token and `top1_agreement` in [0, 1]."""
        return {
            "kl_divergence": self.total / self.num_tokens,
            "top1_agreement": self.num_agreements.double() / self.num_tokens,
        }
