"""A Trainer whose `fit` compresses, trains if asked to, and validates."""

from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

Phase = Literal["one_shot", "finetuned"]


class CompressionTrainer(Trainer):
    """Lightning's Trainer with a `fit` that validates before and after training, and may have no epochs at all.

    The callbacks that compress do so while the first validation is set up: there the processes are up, nothing is
    wrapped, and no gradients or optimizer states are allocated. With `max_epochs=0` that is all.

    Attributes:
        compressing: whether this is a `fit`.
        phase: what the running validation measures.
    """

    compressing = False
    phase: Phase = "one_shot"

    def fit(  # type: ignore[override]
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Run the compression stages, validate, train for `max_epochs`, validate."""
        self.compressing = True
        self.validate(model, val_dataloaders, datamodule=datamodule)
        if self.max_epochs == 0 or self.max_steps == 0:
            return
        self.phase = "finetuned"
        super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
        self.validate(model, val_dataloaders, datamodule=datamodule)

    def validate(self, *args: Any, verbose: bool = False, **kwargs: Any) -> Any:
        """Validate; the report callback shows the figures, so Lightning's own table is left out."""
        return super().validate(*args, verbose=verbose, **kwargs)


def is_compressing(trainer: Trainer, stage: str) -> bool:
    """Tell whether a callback's `setup` belongs to a `fit`, also where that only validates."""
    return stage == "fit" or getattr(trainer, "compressing", False)


def validated_phase(trainer: Trainer) -> Phase | None:
    """Return what a validation measured, or None for those that run inside training."""
    return getattr(trainer, "phase", "one_shot") if trainer.state.fn == TrainerFn.VALIDATING else None
