"""The optimizer of end-to-end training: AdamW, a linear warm-up and a cosine decay, or another by class_path."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil, cos, pi
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import ReduceLROnPlateau as WatchingPlateau
from lightning.pytorch.cli import instantiate_class
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from nowag_pl.functional.ranges import check_real
from nowag_pl.lit.datamodule import data_of

# What a schedule knows of its length, in its state.
OWN_SCHEDULE = ("total_steps", "_schedule_phases")


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a warm-up and a decay, or an optimizer and a scheduler of the user's choice.

    Attributes:
        learning_rate: highest learning rate of AdamW.
        weight_decay: weight decay of matrices under AdamW.
        warmup_fraction: share of the steps in which the learning rate rises.
        optimizer: class_path and init_args of another optimizer; None: AdamW.
        lr_scheduler: class_path and init_args of another scheduler; None: the warm-up and the decay.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    optimizer: Mapping[str, Any] | None = None
    lr_scheduler: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_real("model.learning_rate", self.learning_rate, above=True)
        check_real("model.weight_decay", self.weight_decay)
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(
                f"Expected model.warmup_fraction of at least 0 and below 1, but got {self.warmup_fraction}."
            )
        ours = {
            "optimizer": (self.optimizer, ("learning_rate", "weight_decay")),
            "lr_scheduler": (self.lr_scheduler, ("warmup_fraction",)),
        }
        defaults = {each.name: each.default for each in fields(self)}
        for option, (chosen, names) in ours.items():
            for name in names:
                if chosen is not None and (value := asdict(self)[name]) != defaults[name]:
                    raise ValueError(
                        f"Expected no model.{name} with {option}, which has arguments of its own, but got {value}."
                    )

    @property
    def rate(self) -> str:
        """The option that sets the learning rate, and its value, for messages."""
        if self.optimizer is None:
            return f"model.learning_rate than {self.learning_rate}"
        return f"optimizer.lr than {self.optimizer.get('init_args', {}).get('lr', 'its default')}"

    def described(self) -> dict[str, Any]:
        """Return the settings as JSON values; of a choice that was not made, nothing."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Return the optimizer of the parameters that are trained."""
        if self.optimizer is None:
            return AdamW(decay_groups(parameters, self.weight_decay), lr=self.learning_rate, betas=(0.9, 0.95))
        return instantiate_class([each for each in parameters if each.requires_grad], dict(self.optimizer))

    def make_scheduler(self, optimizer: Optimizer, steps: int) -> dict[str, Any]:
        """Return the scheduler as Lightning takes it.

        Args:
            optimizer: whose rate it sets.
            steps: steps of the whole training, over which a warm-up and a decay go, see :func:`rate_share`. Any
                scheduler goes on after every step; `lightning.pytorch.cli.ReduceLROnPlateau` after every validation.

        Raises:
            ValueError: a scheduler that watches a value does not say which.
        """
        if self.lr_scheduler is None:
            shares = LambdaLR(optimizer, lambda step: rate_share(step, steps, self.warmup_fraction))
            return {"scheduler": shares, "interval": "step"}
        scheduler = instantiate_class(optimizer, dict(self.lr_scheduler))
        if isinstance(scheduler, WatchingPlateau):
            return {"scheduler": scheduler, "monitor": scheduler.monitor}
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "Expected lightning.pytorch.cli.ReduceLROnPlateau with a monitor, such as perplexity/<text>, but got "
                f"{self.lr_scheduler['class_path']}, which does not say which value it watches."
            )
        return {"scheduler": scheduler, "interval": "step"}


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
