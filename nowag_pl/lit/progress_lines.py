"""When training and measuring tell how far they are where there is no terminal for Lightning's bar."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nowag_pl.lit.datamodule import data_of
from nowag_pl.lit.optimizers import num_steps
from nowag_pl.run.progress import Lines


class ProgressLines(Callback):
    """Writes a line at most every 30 seconds, on rank zero."""

    def __init__(self) -> None:
        self._training: Lines | None = None
        self._measuring: dict[int, Lines] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when training begins: start the clock."""
        self._training = Lines("Training", "step", num_steps(trainer), pl_module.device, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_args: Any) -> None:
        """Called after every batch: tell step and loss."""
        lines, step = self._training, trainer.global_step
        if trainer.is_global_zero and lines is not None and lines.is_due(step):
            loss = trainer.callback_metrics.get("train/loss")
            lines.say(step, "" if loss is None else f"loss {float(loss):.4f}")
            # Batches after the last step, and those that are accumulated, would repeat the last line.
            self._training = None if lines.is_over(step) else lines

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation begins: forget the clocks of the last one."""
        self._measuring = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before every batch: start the clock of a text."""
        if dataloader_idx not in self._measuring:
            title = f"Measuring {data_of(trainer).eval_names[dataloader_idx]}"
            total = int(trainer.num_val_batches[dataloader_idx])
            self._measuring[dataloader_idx] = Lines(title, "batch", total, pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Called after every batch: tell how many are measured."""
        lines = self._measuring[dataloader_idx]
        if trainer.is_global_zero and lines.is_due(batch_idx + 1):
            lines.say(batch_idx + 1, "")
