"""The Trainer of one block: its data, its callbacks, and where it goes on."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import Dataset

from nowag_pl.lit.batches import ResumableLoader, Share, SharedBatches
from nowag_pl.lit.block_module import ERROR, BlockModule
from nowag_pl.lit.checkpoint_io import WholeCheckpoints, whole_checkpoint
from nowag_pl.lit.preemption import Preemption
from nowag_pl.run.arrays import SequenceArray
from nowag_pl.run.layout import BLOCK_CHECKPOINTS, block_folder
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.plan import FinetuningSettings

# Checkpoints from which a training goes on, and of the epoch with the lowest error.
_LAST, _BEST = "last", "best"


@dataclass(frozen=True)
class BlockData:
    """Inputs and target outputs of one block for all sequences; those that are held out come last.

    Attributes:
        inputs: hidden states before the block.
        targets: those that it shall give.
        num_train: sequences to train on.
    """

    inputs: SequenceArray
    targets: SequenceArray
    num_train: int

    @property
    def held_out(self) -> range:
        """Numbers of the sequences that decide."""
        return range(self.num_train, len(self.inputs))

    def loader(self, rows: range, batches: SharedBatches) -> ResumableLoader:
        """Return batches of some sequences: "hidden", "target" and "weight"."""
        return ResumableLoader(_Pairs(self.inputs, self.targets, rows.start), batches)


class _Pairs(Dataset[dict[str, Tensor]]):
    """Inputs and targets of a block from some sequence on, a whole batch at a time."""

    def __init__(self, inputs: SequenceArray, targets: SequenceArray, first: int) -> None:
        self._inputs = inputs
        self._targets = targets
        self._first = first

    def __getitem__(self, share: Share) -> dict[str, Tensor]:
        rows = [self._first + index for index in share.indices]
        return {
            "hidden": self._inputs.take(rows),
            "target": self._targets.take(rows),
            "weight": torch.tensor(share.weights),
        }


@dataclass(frozen=True)
class BlockTrainer:
    """Trains blocks, each by a Trainer of its own that goes on at its last epoch.

    Attributes:
        settings: learning rate, epochs and the like.
        trainer_settings: devices, precision and the like of the Trainers.
        ranks: who trains together.
        run_dir: folder of checkpoints.
        loggers: where the error after each epoch is logged.
    """

    settings: FinetuningSettings
    trainer_settings: Mapping[str, Any]
    ranks: Ranks
    run_dir: Path
    loggers: Sequence[Logger] = ()

    def folder(self, index: int) -> Path:
        """Return where the checkpoints of a block are."""
        return self.run_dir / BLOCK_CHECKPOINTS / block_folder(index)

    def train(
        self, index: int, module: BlockModule, data: BlockData, report: Callable[[str], None]
    ) -> tuple[str, list[float]]:
        """Train a block.

        Args:
            index: its number.
            module: the block.
            data: its inputs and targets.
            report: is told of every epoch.

        Returns:
            The checkpoint of the epoch with the lowest held-out error, and the error after each epoch.
        """
        last = self.folder(index) / f"{_LAST}.ckpt"
        best = ModelCheckpoint(
            self.folder(index),
            _BEST,
            monitor=ERROR,
            save_weights_only=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        with _quiet():
            epochs = _Epochs(report, lambda error, step: self._log(index, error, step))
            trainer = self._trainer(index, [best, epochs])
            resumed = self.ranks.broadcast(self.ranks.is_zero and self._can_go_on(index))
            trainer.fit(
                module,
                data.loader(range(data.num_train), self._batches(data.num_train, self.settings.seed + index)),
                data.loader(data.held_out, self._batches(len(data.held_out), None)),
                ckpt_path=str(last) if resumed else None,
                weights_only=True,
            )
        return best.best_model_path, epochs.errors

    def _log(self, index: int, error: float, epoch: int) -> None:
        """Log the error of a block after an epoch, where the run logs."""
        if self.ranks.is_zero:
            for logger in self.loggers:
                logger.log_metrics({f"train/{ERROR}/{block_folder(index)}": error}, step=epoch)

    def _can_go_on(self, index: int) -> bool:
        """Tell whether the checkpoints of a block are there and whole; otherwise the block begins anew."""
        files = [self.folder(index) / f"{name}.ckpt" for name in (_LAST, _BEST)]
        return all([whole_checkpoint(file) for file in files if file.exists()]) and files[0].is_file()

    def _batches(self, num_items: int, seed: int | None) -> SharedBatches:
        return SharedBatches(num_items, self.settings.batch_size, self.ranks.rank, self.ranks.world_size, seed)

    def _trainer(self, index: int, callbacks: list[Callback]) -> Trainer:
        settings, folder = self.settings, self.folder(index)
        best, epochs = callbacks
        return Trainer(
            **self.trainer_settings,
            plugins=[WholeCheckpoints()],
            strategy=DDPStrategy(broadcast_buffers=False) if self.ranks.world_size > 1 else "auto",
            max_epochs=settings.max_epochs,
            accumulate_grad_batches=settings.accumulate_grad_batches,
            gradient_clip_val=settings.gradient_clip_val,
            callbacks=[
                _Stopping(ERROR, patience=settings.stop_patience),
                best,
                ModelCheckpoint(folder, _LAST, enable_version_counter=False),
                Preemption(folder / f"{_LAST}.ckpt"),
                epochs,
            ],
            logger=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.run_dir,
        )


class _Stopping(EarlyStopping):
    """Early stopping that also stops a training that was cut after its last epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where there is nothing left to do."""
        trainer.should_stop = self.wait_count >= self.patience


class _Epochs(Callback):
    """Keeps the held-out error after each epoch, over interruptions, and tells it."""

    def __init__(self, report: Callable[[str], None], log: Callable[[float, int], None]) -> None:
        self.errors: list[float] = []
        self._report, self._log = report, log

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the error of the epoch; one that is done again counts once."""
        error = float(trainer.callback_metrics[ERROR])
        self.errors[trainer.current_epoch :] = [error]
        self._report(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, held-out error {error:.4f}")
        self._log(error, trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"errors": self.errors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the epochs of an earlier process."""
        self.errors = list(state_dict["errors"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the banners of many small Trainers from the screen."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    loggers += [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # A block is trained in the mode in which it will be used.
            warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode")
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
