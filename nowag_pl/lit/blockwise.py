"""Blockwise finetuning: every compressed block is trained to do what the dense block does, one after the other.

Inputs of a block are the hidden states that the compressed and already finetuned blocks before it produce. Each block
has a small Trainer of its own. Hidden states lie in files, so that a killed run goes on at its block and epoch.
"""

import gc
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import Dataset

from nowag_pl.lit.batches import ResumableLoader, Share, SharedBatches
from nowag_pl.lit.block_module import ERROR, BlockModule
from nowag_pl.lit.preemption import Preemption, stop_if_asked
from nowag_pl.models.format.tensors import stored_state
from nowag_pl.pipeline.block_needs import num_streams
from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.run.progress import block_progress
from nowag_pl.run.wording import readable
from nowag_pl.stages import finetuned as finetuning
from nowag_pl.stages.compression_run import CompressionRun

_log = logging.getLogger("nowag_pl")
_LAST = "last"


@dataclass(frozen=True)
class BlockwiseSettings:
    """How each block is trained.

    Attributes:
        targets: "block" for what the dense block makes of the same inputs; "model" for the hidden states of the
            dense model.
        max_epochs: passes over the training sequences at most.
        learning_rate: of AdamW at the start.
        batch_size: sequences per step on all devices together.
        accumulate_grad_batches: batches whose gradients are added up before a step.
        gradient_clip_val: largest norm of a gradient.
        plateau_patience: epochs without a lower held-out error before the learning rate is halved.
        stop_patience: epochs without a lower held-out error before a block is done.
        seed: of the order of the sequences.
        activations: where hidden states are while they are used: "memory" for host memory, "disk" for mapped files.
    """

    targets: Literal["block", "model"] = "block"
    max_epochs: int = 5
    learning_rate: float = 1e-4
    batch_size: int = 8
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 1.0
    plateau_patience: int = 0
    stop_patience: int = 3
    seed: int = 0
    activations: Literal["memory", "disk"] = "memory"

    def __post_init__(self) -> None:
        for name in ("max_epochs", "batch_size", "accumulate_grad_batches", "stop_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"Expected finetuning.{name} of at least 1, but got {getattr(self, name)}.")
        for name in ("learning_rate", "gradient_clip_val"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected finetuning.{name} above 0, but got {getattr(self, name)}.")
        if self.plateau_patience < 0:
            raise ValueError(f"Expected finetuning.plateau_patience of at least 0, but got {self.plateau_patience}.")


def finetune_blocks(
    run: CompressionRun,
    train: Tensor,
    held_out: Tensor,
    settings: BlockwiseSettings,
    trainer_settings: dict[str, Any],
) -> None:
    """Write every finetuned block that the run directory lacks.

    Args:
        run: a run whose linears are compressed.
        train: sequences to train on `[num_sequences, seq_len]`, the same on every rank.
        held_out: sequences that decide `[num_held_out, seq_len]`.
        settings: how.
        trainer_settings: devices, precision and the like of the Trainers.
    """
    run.claim_finetuning(train, held_out, settings)
    missing = set(run.store.missing(finetuning.STAGE, len(run.model)))
    if missing:
        with run.measuring("finetuning"):
            _Blockwise(run, train, held_out, settings, trainer_settings).finetune(missing)


class _Blockwise:
    """The state of a blockwise finetuning between two blocks: files of hidden states."""

    def __init__(
        self,
        run: CompressionRun,
        train: Tensor,
        held_out: Tensor,
        settings: BlockwiseSettings,
        trainer_settings: dict[str, Any],
    ) -> None:
        self.run, self.model, self.store, self.ranks = run, run.model, run.store, run.store.ranks
        self.settings = settings
        self.trainer_settings = trainer_settings
        self.windows = torch.cat([train, held_out])
        self.num_train = len(train)
        self.folder = self.store.folder / finetuning.STAGE
        self.arrays = ArrayFolder(self.folder / "hidden", self.ranks, in_memory=settings.activations == "memory")
        self.streams = ["prefix", "dense"] if settings.targets == "model" else ["prefix"]
        self.dtype = run.checkpoint.dtype
        self.entry_shape = (self.windows.shape[1], self.model.hidden_size)

    def finetune(self, missing: set[int]) -> None:
        """Go through the blocks from the last one whose inputs are there."""
        if self.ranks.is_zero:
            self._announce()
        last = max(missing)
        start = next((i for i in range(min(missing), 0, -1) if self._has_inputs(i)), 0)
        if start == 0 and not self._has_inputs(0):
            for stream in self.streams:
                self._write(f"{stream}_000", lambda rows: self.model.embed(self.windows[rows]).hidden)
        with block_progress("Finetuning", last + 1, self.ranks.is_zero, self.model.device) as report:
            for index in range(start):
                report("already there" if index not in missing else "skipped")
            for index in range(start, last + 1):
                stop_if_asked()
                report(self._visit(index, index in missing, index < last, lambda text: report(text, 0)))
        if self.ranks.is_zero:
            self.arrays.clear()

    def _visit(self, index: int, is_missing: bool, goes_on: bool, report: Callable[[str], None]) -> str:
        """Finetune a block that is missing, and write the inputs of the next one; return what to say of it."""
        note = "already there"
        inputs = self._read(f"prefix_{index:03d}")
        if is_missing:
            note = self._finetune_block(index, inputs, self._targets(index, inputs), report)
        if goes_on:
            self._advance(index, inputs)
        return note

    def _announce(self) -> None:
        """Say how large the hidden states are."""
        size = len(self.windows) * self.entry_shape[0] * self.entry_shape[1] * self.dtype.itemsize
        place = "host memory of every process" if self.settings.activations == "memory" else "mapped files"
        _log.info(
            "Finetuning %d blocks on %d sequences, held out %d: hidden states take up to %s in %s and %s on disk",
            len(self.model),
            self.num_train,
            len(self.windows) - self.num_train,
            readable(2 * size),
            place,
            readable(num_streams(self.settings.targets) * size),
        )

    def _has_inputs(self, index: int) -> bool:
        return all(f"{stream}_{index:03d}" in self.arrays for stream in self.streams)

    def _read(self, name: str) -> SequenceArray:
        return self.arrays.read(name, self.dtype)

    @torch.no_grad()
    def _write(self, name: str, compute: Callable[[Tensor], Tensor]) -> None:
        """Write an array of hidden states; `compute` makes those of some sequences."""
        if name in self.arrays:
            return
        rows = torch.arange(len(self.windows))[self.ranks.rank :: self.ranks.world_size]
        size = max(self.settings.batch_size // self.ranks.world_size, 1)
        batches = ((compute(part).cpu(),) for part in (rows.split(size) if len(rows) else ()))
        self.arrays.write({name: (self.entry_shape, self.dtype)}, len(self.windows), batches)

    def _forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.model.device)
        return self.model.forward_block(block, hidden, self.model.arguments(index, *hidden.shape[:2]))

    def _targets(self, index: int, inputs: SequenceArray) -> SequenceArray:
        """Return what the dense block makes of its inputs."""
        return self._read(self._write_targets(index, inputs))

    def _write_targets(self, index: int, inputs: SequenceArray) -> str:
        """Write what the dense block makes of its inputs, if it is not there; return its name."""
        following = f"dense_{index + 1:03d}" if self.settings.targets == "model" else f"targets_{index:03d}"
        if following not in self.arrays:
            source = self._read(f"dense_{index:03d}") if self.settings.targets == "model" else inputs
            dense = self.model.load_block(index)
            self._write(following, lambda rows: self._forward(dense, index, source.take(rows.tolist())))
        return following

    def _advance(self, index: int, inputs: SequenceArray) -> None:
        """Write the inputs of the next block, and delete those of this one."""
        block = finetuning.load_finetuned_block(self.model, self.store, index).to(self.model.device)
        self._write(f"prefix_{index + 1:03d}", lambda rows: self._forward(block, index, inputs.take(rows.tolist())))
        if self.settings.targets == "model":
            self._write_targets(index, inputs)  # also where this block was there already
        if self.ranks.is_zero:
            for name in (*(f"{stream}_{index:03d}" for stream in self.streams), f"targets_{index:03d}"):
                self.arrays.remove(name)

    def _finetune_block(
        self, index: int, inputs: SequenceArray, targets: SequenceArray, report: Callable[[str], None]
    ) -> str:
        """Train one block, keep the best of all epochs and of what it was before, and write it."""
        started = time.perf_counter()
        folder = self.folder / "checkpoints" / f"block_{index:03d}"
        block = finetuning.load_compressed_block(self.model, self.store, index).to(self.model.device)
        scale = self._mean_square(index, inputs, targets, None) or 1.0
        before = self._mean_square(index, inputs, targets, block) / scale
        best, epochs = self._train(index, block, inputs, targets, scale, folder, report)
        del block
        gc.collect()  # Trainer and module refer to each other, and hold the block and its optimizer
        result = self._load_trained(index, best)
        after = self._mean_square(index, inputs, targets, result) / scale
        if not after < before:
            del result  # before the block is read once more
            result, after = finetuning.load_compressed_block(self.model, self.store, index), before
        metadata = {"seconds": time.perf_counter() - started, "before": before, "after": after, "epochs": epochs}
        finetuning.write_block(self.store, index, result, metadata)
        if self.ranks.is_zero:
            shutil.rmtree(folder, ignore_errors=True)
        return f"held-out error {before:.4f} -> {after:.4f} in {epochs} epochs"

    def _load_trained(self, index: int, path: str) -> nn.Module:
        """Return the block of a Trainer's checkpoint, rounded as it is stored."""
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        trained = {name.removeprefix("block."): tensor for name, tensor in state.items() if name.startswith("block.")}
        block = finetuning.load_compressed_block(self.model, self.store, index)
        block.load_state_dict(trained)
        block.load_state_dict(stored_state(block))
        return block

    @torch.no_grad()
    def _mean_square(self, index: int, inputs: SequenceArray, targets: SequenceArray, block: nn.Module | None) -> float:
        """Return the held-out mean square of target minus output, or target minus input without a block."""
        rows = self.ranks.share([str(row) for row in range(self.num_train, len(self.windows))])
        total = torch.zeros((), dtype=torch.float64)
        for row in map(int, rows):
            hidden, target = inputs.take([row]).to(self.model.device), targets.take([row]).to(self.model.device)
            output = hidden if block is None else self._forward(block, index, hidden)
            total += (output.float() - target.float()).square().mean().double().cpu()
        return float(sum(self.ranks.gather(total))) / (len(self.windows) - self.num_train)

    def _train(
        self,
        index: int,
        block: nn.Module,
        inputs: SequenceArray,
        targets: SequenceArray,
        scale: float,
        folder: Path,
        report: Callable[[str], None],
    ) -> tuple[str, int]:
        """Run the Trainer of one block from its last epoch on; return its best checkpoint and its number of epochs."""
        settings, ranks = self.settings, self.ranks
        module = BlockModule(
            block,
            self.model.forward_block,
            lambda batch_size, seq_len: self.model.arguments(index, batch_size, seq_len),
            scale,
            settings.learning_rate,
            settings.plateau_patience,
        )

        def loader(first: int, count: int, seed: int | None) -> ResumableLoader:
            batches = SharedBatches(count, settings.batch_size, ranks.rank, ranks.world_size, seed)
            return ResumableLoader(_Pairs(inputs, targets, first), batches)

        best = ModelCheckpoint(
            folder,
            "best",
            monitor=ERROR,
            save_weights_only=True,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        last = ModelCheckpoint(folder, _LAST, enable_version_counter=False)
        with _quiet():
            trainer = Trainer(
                **self.trainer_settings,
                strategy=DDPStrategy(broadcast_buffers=False) if ranks.world_size > 1 else "auto",
                max_epochs=settings.max_epochs,
                accumulate_grad_batches=settings.accumulate_grad_batches,
                gradient_clip_val=settings.gradient_clip_val,
                callbacks=[
                    _Stopping(ERROR, patience=settings.stop_patience),
                    best,
                    last,
                    Preemption(folder / f"{_LAST}.ckpt"),
                    _EpochReport(report),
                ],
                logger=TensorBoardLogger(self.store.folder, "finetuning", f"block_{index:03d}"),
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                log_every_n_steps=1,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=self.store.folder,
            )
            resumed = ranks.broadcast((folder / f"{_LAST}.ckpt").is_file())
            trainer.fit(
                module,
                loader(0, self.num_train, settings.seed + index),
                loader(self.num_train, len(self.windows) - self.num_train, None),
                ckpt_path=str(folder / f"{_LAST}.ckpt") if resumed else None,
                weights_only=True,
            )
        return best.best_model_path, trainer.current_epoch


class _Pairs(Dataset[dict[str, Tensor]]):
    """Inputs and targets of a block, a whole batch at a time."""

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


class _Stopping(EarlyStopping):
    """Early stopping that also stops a training that was cut after its last epoch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once where there is nothing left to do."""
        trainer.should_stop = self.wait_count >= self.patience


class _EpochReport(Callback):
    """Says how far a block is."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell epoch and error."""
        error = float(trainer.callback_metrics[ERROR])
        self._report(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}, held-out error {error:.4f}")


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
            warnings.filterwarnings("ignore", ".*module\\(s\\) in eval mode")  # meant so: the block as it will be used
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
