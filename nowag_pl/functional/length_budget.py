"""A budget on the mean length of answers, held by a primal-dual update (LACONIC, arXiv:2602.14468).

Maximise the expected reward of the task subject to `E[L] <= B`, where L is the number of tokens of an answer. The price
`lambda` of a longer answer follows the mean length of each batch; the reward of an answer falls by that price.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.ranges import check_real, check_whole


@dataclass(frozen=True)
class LengthBudget:
    """A budget and how fast and how far its price moves.

    Attributes:
        tokens: mean length of an answer that is aimed at, B; its stop token counts.
        rate: change of the price lambda per step, eta, for an answer of twice the budget.
        ceiling: highest price. Below the reward of a right answer it keeps a long right answer above a short wrong one.
        cap: largest loss of reward by length.
        hit: loss of reward of an answer that reaches the longest length that is sampled.
    """

    tokens: int
    rate: float = 0.005
    ceiling: float = 0.1
    cap: float = 0.4
    hit: float = 0.1

    def __post_init__(self) -> None:
        check_whole("budget.tokens", self.tokens, 1)
        check_real("budget.rate", self.rate, above=True)
        for name, value in (("ceiling", self.ceiling), ("cap", self.cap), ("hit", self.hit)):
            check_real(f"budget.{name}", value)


def length_cost(lengths: Int[Tensor, " answers"], budget: LengthBudget) -> Float[Tensor, " answers"]:
    """Return what each answer is over the budget, `max(0, (L - B) / B)`.

    The hinge keeps short answers from being paid for being shorter still.

    Args:
        lengths: tokens of each answer.
        budget: gives B.
    """
    return ((lengths - budget.tokens).double() / budget.tokens).clamp_min(0.0)


def length_penalty(lengths: Int[Tensor, " answers"], price: float, budget: LengthBudget) -> Float[Tensor, " answers"]:
    """Return the loss of reward of each answer by its length, `min(lambda * max(0, (L - B) / B), cap)`.

    Args:
        lengths: tokens of each answer.
        price: lambda.
        budget: gives B and the cap.
    """
    return (price * length_cost(lengths, budget)).clamp_max(budget.cap)


def shaped_rewards(
    rewards: Float[Tensor, " answers"],
    lengths: Int[Tensor, " answers"],
    price: float,
    budget: LengthBudget,
    max_length: int,
) -> Float[Tensor, " answers"]:
    """Return rewards after length, `r - min(lambda * max(0, (L - B) / B), cap) - hit * [L = longest]`.

    They are taken before advantages are normalised. With lambda = 0 and no answer of the longest length they are the
    rewards themselves.

    Args:
        rewards: of the task.
        lengths: tokens of each answer.
        price: lambda.
        budget: the budget.
        max_length: tokens after which an answer is cut off.
    """
    return rewards - length_penalty(lengths, price, budget) - budget.hit * (lengths >= max_length)


def updated_price(price: float, mean_length: float, budget: LengthBudget) -> float:
    """Return the price after a step, `clip(lambda + eta * (mean(L) / B - 1), 0, ceiling)`.

    The mean is signed, unlike the cost: lambda falls while the budget is loose.

    Args:
        price: lambda, 0 at first.
        mean_length: mean over all answers of the step.
        budget: the budget.

    >>> updated_price(0.0, 30.0, LengthBudget(20, rate=0.01))
    0.005
    >>> updated_price(0.004, 10.0, LengthBudget(20, rate=0.01))
    0.0
    """
    return min(max(price + budget.rate * (mean_length / budget.tokens - 1), 0.0), budget.ceiling)
