"""The state of a policy gradient beside the weights: the price of length, answers in use, and what was measured."""

from typing import Any, NamedTuple

from torch import Tensor

from nowag_pl.models.rollouts import Answers
from nowag_pl.run.ranks import Ranks

# What is measured at every step, over all ranks: mean reward before length counts, share of right answers, mean tokens
# of an answer, the same over the budget, the price, the share of answers whose loss by length is at its cap, that of
# answers of the longest length, that of tokens whose ratio is cut, and means over tokens in nats.
FIGURES = (
    "reward",
    "accuracy",
    "mean_length",
    "length_over_budget",
    "lambda",
    "share_capped",
    "share_at_maximum",
    "share_clipped",
    "kl",
    "entropy",
)


class Rollout(NamedTuple):
    """Answers of one rank, and what the updates on them need.

    Attributes:
        numbers: of the prompts `[prompts]`.
        answers: those to each prompt one after the other.
        advantages: of each answer.
        counts: which answers are no padding of the ranks.
        num_tokens: tokens of all answers of all ranks.
        old: log-probabilities of the tokens under the model that has sampled them, once they are known.
        update: number of the next update on them.
    """

    numbers: Tensor
    answers: Answers
    advantages: Tensor
    counts: Tensor
    num_tokens: int
    old: Tensor | None
    update: int

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return {**self._asdict(), "answers": self.answers._asdict()}

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Rollout":
        """Return what :meth:`state_dict` described."""
        return cls(**{**state, "answers": Answers(**state["answers"])})


class Controller:
    """The state of the training that goes into checkpoints.

    Attributes:
        step: number of the next batch of answers.
        price: lambda, what length costs.
        mean_length: tokens of an answer in the last step; None before the first.
        history: figures of every step by name.
        shown: a few answers of the first and of the last steps, with what was measured of each.
        rollout: answers of this rank on which there are more updates.
    """

    def __init__(self) -> None:
        self.step = 0
        self.price = 0.0
        self.mean_length: float | None = None
        self.history: dict[str, list[float]] = {}
        self.shown: dict[str, list[dict[str, Any]]] = {"first": [], "last": []}
        self.rollout: Rollout | None = None

    def note(self, figures: dict[str, float]) -> None:
        """Add figures of a step to the history."""
        for name, value in figures.items():
            self.history.setdefault(name, []).append(value)

    def show(self, answers: list[dict[str, Any]]) -> None:
        """Keep answers as those of the last step, and of the first one if it is."""
        self.shown["last"] = answers
        if self.step == 0:
            self.shown["first"] = answers

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors; all ranks must call."""
        rollouts = Ranks.current().gather(None if self.rollout is None else self.rollout.state_dict())
        state = {name: value for name, value in vars(self).items() if name != "rollout"}
        return {**state, "rollouts": None if rollouts[0] is None else rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: there are more updates on answers of another number of ranks.
        """
        rollouts, ranks = state["rollouts"], Ranks.current()
        if rollouts is not None and len(rollouts) != ranks.world_size:
            raise ValueError(
                f"Expected {len(rollouts)} ranks, which share the answers of the checkpoint, but got "
                f"{ranks.world_size}. A checkpoint after the last update on them goes on with any number."
            )
        for name in ("step", "price", "mean_length", "history", "shown"):
            setattr(self, name, state[name])
        self.rollout = None if rollouts is None else Rollout.of(rollouts[ranks.rank])
