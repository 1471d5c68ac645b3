"""Policy gradients over groups of answers to the same prompt.

GRPO (arXiv:2402.03300), with the mean over tokens of all answers and the two bounds of DAPO (arXiv:2503.14476); RLOO
(arXiv:2402.14740); REINFORCE++ (arXiv:2501.03262); the division by the standard deviation left out as in Dr. GRPO
(arXiv:2503.20783).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nowag_pl.functional.ranges import check_real

Base = Literal["grpo", "rloo", "reinforce++"]
_TINY = 1e-6  # beside a standard deviation


@dataclass(frozen=True)
class PolicySettings:
    """How rewards become a loss.

    Attributes:
        base: what a reward is compared with. "grpo": the mean of its group; "rloo": the mean of the others in its
            group; "reinforce++": the mean of the whole batch.
        divide_by_std: divide advantages by the standard deviation of the group (of the batch for "reinforce++"). It
            makes prompts of any difficulty count alike. The trap: in a group whose answers are all right, rewards
            differ by length alone, and the division turns any price lambda > 0, however small, into advantages of
            full size. The price then says only whether length counts, not how much.
        clip_low: the ratio of a token's probabilities is cut below `1 - clip_low`.
        clip_high: and above `1 + clip_high`.
        kl_coefficient: weight of the divergence from the reference. 0: no reference is kept.
    """

    base: Base = "grpo"
    divide_by_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.01

    def __post_init__(self) -> None:
        for name, value in (("clip_high", self.clip_high), ("kl_coefficient", self.kl_coefficient)):
            check_real(f"policy.{name}", value)
        check_real("policy.clip_low", self.clip_low, most=1.0)


def group_advantages(
    rewards: Float[Tensor, "prompts group"], base: Base = "grpo", divide_by_std: bool = True
) -> Float[Tensor, "prompts group"]:
    """Return by how much each reward is above what it is compared with.

    Args:
        rewards: of each answer; those to one prompt in a row.
        base: see :class:`PolicySettings`.
        divide_by_std: divide by the standard deviation plus 1e-6; that of a single reward counts as 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), "rloo", divide_by_std=False)
    tensor([[ 0.6667, -0.6667, -0.6667,  0.6667]])
    """
    # In float64, so that equal rewards give 0 rather than a rounding error that the division would enlarge.
    exact = rewards.double()
    rows = exact.flatten()[None] if base == "reinforce++" else exact
    size = rows.shape[1]
    advantages = rows - rows.mean(dim=1, keepdim=True)
    spread = rows.std(dim=1, keepdim=True) if size > 1 else torch.zeros_like(rows)
    if base == "rloo" and size > 1:
        advantages = advantages * size / (size - 1)
    if divide_by_std:
        advantages = advantages / (spread + _TINY)
    return advantages.reshape(rewards.shape).to(rewards.dtype)


def clipped_surrogate(
    log_probability: Float[Tensor, "answers tokens"],
    old_log_probability: Float[Tensor, "answers tokens"],
    advantages: Float[Tensor, " answers"],
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "answers tokens"]:
    """Return the loss of each token, `-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)` (arXiv:1707.06347).

    Args:
        log_probability: of the sampled tokens under the model, in nats.
        old_log_probability: under the model that has sampled them.
        advantages: of each answer.
        clip_low: in [0, 1].
        clip_high: at least 0.
    """
    ratio = (log_probability - old_log_probability).exp()
    advantage = advantages[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def is_clipped(
    log_probability: Float[Tensor, "answers tokens"],
    old_log_probability: Float[Tensor, "answers tokens"],
    advantages: Float[Tensor, " answers"],
    clip_low: float,
    clip_high: float,
) -> Bool[Tensor, "answers tokens"]:
    """Return which tokens the bound takes the gradient from; arguments as for :func:`clipped_surrogate`."""
    ratio = (log_probability - old_log_probability).exp()
    above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
    return (above & (advantages[:, None] > 0)) | (below & (advantages[:, None] < 0))


def low_variance_kl(
    log_probability: Float[Tensor, "answers tokens"], reference: Float[Tensor, "answers tokens"]
) -> Float[Tensor, "answers tokens"]:
    """Return an estimate of `KL(model || reference)` at each token, `exp(d) - d - 1` with `d = log q - log p`.

    It is unbiased, never negative, and varies less than `-d` alone (http://joschu.net/blog/kl-approx.html).

    Args:
        log_probability: log p of tokens that the model has sampled.
        reference: log q of the same tokens.
    """
    difference = reference - log_probability
    return difference.exp() - difference - 1


def policy_losses(
    log_probability: Float[Tensor, "answers tokens"],
    old_log_probability: Float[Tensor, "answers tokens"],
    reference: Float[Tensor, "answers tokens"] | None,
    advantages: Float[Tensor, " answers"],
    settings: PolicySettings,
) -> Float[Tensor, "answers tokens"]:
    """Return the loss of each token: the clipped surrogate and the divergence from the reference.

    The loss of a step is their mean over the tokens of all answers, so that a long answer counts by its tokens.

    Args:
        log_probability: of the sampled tokens under the model, in nats.
        old_log_probability: under the model that has sampled them.
        reference: under the reference; None leaves the divergence out.
        advantages: of each answer.
        settings: bounds and weight.
    """
    bounds = (settings.clip_low, settings.clip_high)
    losses = clipped_surrogate(log_probability, old_log_probability, advantages, *bounds)
    if reference is not None:
        losses = losses + settings.kl_coefficient * low_variance_kl(log_probability, reference)
    return losses


def token_entropy(logits: Float[Tensor, "*positions vocabulary"]) -> Float[Tensor, "*positions"]:
    """Return the entropy of the predictions in nats.

    Args:
        logits: of any shape.

    >>> token_entropy(torch.zeros(2, 4))
    tensor([1.3863, 1.3863])
    """
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
