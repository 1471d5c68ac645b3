"""What a Trainer is doing: whether it fits, which state of the model it measures, and whether it trains end to end."""

from inspect import signature
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator
from lightning.pytorch.trainer.states import TrainerFn

from nowag_pl.lit.trainer_options import check_options, naming_options

Phase = Literal["one_shot", "blockwise", "finetuned"]
BlockPrecision = Literal["auto", "32-true", "bf16-mixed"]


class PhasedTrainer(Trainer):
    """A Trainer that says where in a fit it is.

    Attributes:
        compressing: whether this is a `fit`, in its validations as well.
        phase: the state of the model that the running validation measures.
        callbacks: in the order in which they are called.
        datamodule: the data of the running `fit` or `validate`.
        options: arguments of the constructor by name, with Lightning's defaults.
    """

    compressing = False
    phase: Phase = "one_shot"

    # Lightning sets these two without declaring them.
    callbacks: list[Callback]
    datamodule: LightningDataModule | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = signature(Trainer.__init__)
        bound = known.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.options = {name: value for name, value in bound.arguments.items() if name != "self"}
        check_options(self.options)
        with naming_options(self.options, known.parameters):
            super().__init__(*args, **kwargs)


def block_precision(accelerator: Accelerator, asked: BlockPrecision) -> BlockPrecision:
    """Return the precision in which blocks are finetuned where "auto" may be asked for."""
    if asked != "auto":
        return asked
    on_cuda = isinstance(accelerator, CUDAAccelerator)
    return "bf16-mixed" if on_cuda and torch.cuda.is_bf16_supported() else "32-true"


def is_compressing(trainer: Trainer, stage: str) -> bool:
    """Tell whether a callback's `setup` belongs to a `fit`, also where that only validates."""
    return stage == "fit" or (isinstance(trainer, PhasedTrainer) and trainer.compressing)


def phase_of(trainer: Trainer) -> Phase:
    """Return which state of the model is measured; one that is not compressed in phases counts as one-shot."""
    return trainer.phase if isinstance(trainer, PhasedTrainer) else "one_shot"


def validated_phase(trainer: Trainer) -> Phase | None:
    """Return the state that a validation measured, or None for those that run inside training."""
    return phase_of(trainer) if trainer.state.fn == TrainerFn.VALIDATING else None


def trains_end_to_end(trainer: Trainer) -> bool:
    """Tell whether a fit trains the whole model after its other stages."""
    return trainer.max_epochs != 0 and trainer.max_steps != 0
