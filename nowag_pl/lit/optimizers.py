"""The optimizer of end-to-end training: AdamW, a linear warm-up and a cosine decay."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, cos, pi
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nowag_pl.functional.ranges import check_real
from nowag_pl.lit.datamodule import data_of

# What a schedule knows of its length, in its state.
OWN_SCHEDULE = ("total_steps", "_schedule_phases")


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rate and decay.

    Attributes:
        learning_rate: highest learning rate.
        weight_decay: weight decay of matrices.
        warmup_fraction: share of the steps in which the learning rate rises.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05

    def __post_init__(self) -> None:
        check_real("model.learning_rate", self.learning_rate, above=True)
        check_real("model.weight_decay", self.weight_decay)
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"Expected model.warmup_fraction of at least 0 and below 1, but got {self.warmup_fraction}."
            )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> AdamW:
        """Return AdamW over the parameters that are trained."""
        return AdamW(decay_groups(parameters, self.weight_decay), lr=self.learning_rate, betas=(0.9, 0.95))

    def scheduler(self, optimizer: AdamW, steps: int) -> LambdaLR:
        """Return a warm-up and a decay over so many steps, see :func:`rate_share`."""
        return LambdaLR(optimizer, lambda step: rate_share(step, steps, self.warmup_fraction))


def rate_share(step: int, steps: int, warmup_fraction: float) -> float:
    """Return the share of the highest learning rate at a step: a line up, then half a cosine down.

    Neither the first step nor the last one has a rate of 0, so that a training of one step trains.

    Args:
        step: number of the step, from 0 on.
        steps: number of steps of the whole training.
        warmup_fraction: share of the steps in which the rate rises, in [0, 1).

    Example:
        >>> [round(rate_share(step, 4, 0.5), 3) for step in range(4)]
        [0.333, 0.667, 1.0, 0.5]
    """
    warmup = warmup_fraction * steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    # Lightning asks once more after the last step.
    return 0.5 * (1 + cos(pi * min((step - warmup) / (steps - warmup), 1.0)))


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of trained parameters for an optimizer: matrices decay; vectors (norms, biases, scales) do not.

    Args:
        parameters: parameters of a model; those without gradients are left out.
        weight_decay: weight decay of matrices.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    # FSDP2 cannot store the state of an empty group.
    return [group for group in groups if group["params"]]


def num_steps(trainer: Trainer) -> int:
    """Return the optimizer steps of the whole training.

    Lightning's own estimate loads the training data before a checkpoint is read, which then loses its place in it.

    Raises:
        ValueError: the training has no end.
    """
    limit = trainer.limit_train_batches
    batches = len(data_of(trainer).train_dataloader())
    batches = min(limit, batches) if isinstance(limit, int) else int((1.0 if limit is None else limit) * batches)
    steps = ceil(batches / trainer.accumulate_grad_batches)
    limits = {steps * (trainer.max_epochs or 0), trainer.max_steps}
    if not any(limit > 0 for limit in limits):
        raise ValueError("Expected trainer.max_epochs or trainer.max_steps above 0, to know the learning rate's end.")
    return min(limit for limit in limits if limit > 0)
