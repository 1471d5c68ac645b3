"""Blockwise finetuning: compressed blocks are trained one after the other to reproduce the dense blocks' outputs.

Inputs of a block are the hidden states that the compressed and already finetuned blocks before it produce. Each block
has a small Trainer of its own; a killed run continues at its block and epoch.
"""

import dataclasses
import gc
import logging
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from nowag_pl.lit.block_module import BlockModule
from nowag_pl.lit.block_trainer import BlockData, BlockTrainer
from nowag_pl.lit.checkpoint_io import read_checkpoint
from nowag_pl.lit.preemption import stop_if_asked
from nowag_pl.models.state import stored_state
from nowag_pl.run.layout import BLOCK_CHECKPOINTS, FINETUNED, HIDDEN, block_folder
from nowag_pl.run.progress import block_progress
from nowag_pl.run.wording import readable
from nowag_pl.stages import finetuned
from nowag_pl.stages.block_inputs import BlockInputs
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import FinetuningSettings

_log = logging.getLogger("nowag_pl")


def finetune_blocks(
    run: CompressionRun,
    train: Tensor,
    held_out: Tensor,
    settings: FinetuningSettings,
    trainer_settings: dict[str, Any],
    loggers: Sequence[Logger] = (),
) -> None:
    """Write every finetuned block that the run directory lacks.

    Args:
        run: a run whose linears are compressed.
        train: sequences to train on `[num_sequences, seq_len]`, the same on every rank.
        held_out: sequences that choose the epoch `[num_held_out, seq_len]`.
        settings: settings of the finetuning.
        trainer_settings: devices, precision and the like of the Trainers.
        loggers: where the error of each block after each epoch is logged.
    """
    settings = dataclasses.replace(settings, precision=trainer_settings.get("precision", settings.precision))
    run.claim_finetuning(train, held_out, settings)
    missing = run.store.missing(FINETUNED, len(run.model))
    _remove_left_overs(run, missing)
    if not missing:
        return
    hidden = BlockInputs(run, torch.cat([train, held_out]), settings)
    trainer = BlockTrainer(settings, trainer_settings, run.store.ranks, run.store.folder, loggers)
    if run.store.ranks.is_zero:
        _log.info(
            "Finetuning %d blocks on %d sequences, held out %d: hidden states take up to %s in %s and %s on disk",
            len(run.model),
            len(train),
            len(held_out),
            readable(settings.num_held * hidden.num_bytes),
            "host memory of every process" if settings.activations == "memory" else "mapped files",
            readable(settings.num_streams * hidden.num_bytes),
        )
    with run.measuring("finetuning"):
        Blockwise(run, hidden, trainer, len(train)).finetune(missing)


def _remove_left_overs(run: CompressionRun, missing: Collection[int]) -> None:
    """Delete, on rank zero, what a process had no time to delete that was killed after a block, or after the last."""
    if not run.store.ranks.is_zero:
        return
    folder = run.store.folder
    for index in range(len(run.model)):
        if index not in missing:
            shutil.rmtree(folder / BLOCK_CHECKPOINTS / block_folder(index), ignore_errors=True)
    for name in () if missing else (HIDDEN, BLOCK_CHECKPOINTS):
        shutil.rmtree(folder / name, ignore_errors=True)


class Blockwise:
    """The walk over the blocks.

    Args:
        run: a run whose linears are compressed.
        hidden: hidden states between blocks.
        trainer: trains a block.
        num_train: sequences to train on; the others choose the epoch.
    """

    def __init__(self, run: CompressionRun, hidden: BlockInputs, trainer: BlockTrainer, num_train: int) -> None:
        self._model, self._store, self._ranks = run.model, run.store, run.store.ranks
        self._hidden, self._trainer, self._num_train = hidden, trainer, num_train

    def finetune(self, missing: Collection[int]) -> None:
        """Go through the blocks from the last one whose inputs are there to the last one that is missing."""
        start, last = self._hidden.begin(missing), max(missing)
        with block_progress("Finetuning", last + 1, self._ranks.is_zero, self._model.device) as report:
            for index in range(start):
                report("already there" if index not in missing else "skipped")
            for index in range(start, last + 1):
                stop_if_asked()
                inputs, note = self._hidden.inputs(index), "already there"
                if index in missing:
                    targets = self._hidden.targets(index, inputs)
                    note = self._finetune_block(
                        index, BlockData(inputs, targets, self._num_train), lambda text: report(text, 0)
                    )
                    # Two sets of hidden states at a time: these go before those of the next block come.
                    del targets
                if index < last:
                    self._hidden.advance(index, inputs)
                del inputs
                report(note)
        self._hidden.clear()

    def _finetune_block(self, index: int, data: BlockData, report: Callable[[str], None]) -> str:
        """Train one block, keep the best of all epochs and the untrained block, write it, and return its figures."""
        started = time.perf_counter()
        scale = self._mean_square(index, data, None) or 1.0
        block = self._compressed(index).to(self._model.device)
        before = self._mean_square(index, data, block) / scale
        best, curve = self._trainer.train(index, self._module(index, block, scale), data, report)
        del block
        # Trainer and module refer to each other, and hold the block and its optimizer.
        gc.collect()
        result = self._trained(index, best)
        after = self._mean_square(index, data, result) / scale
        if not after < before:
            # The trained block goes before the untrained one is read once more.
            del result
            result, after = self._compressed(index), before
        seconds, epochs = time.perf_counter() - started, len(curve)
        metadata = {"seconds": seconds, "before": before, "after": after, "epochs": epochs, "curve": curve}
        finetuned.write_block(self._store, index, result, metadata)
        if self._ranks.is_zero:
            shutil.rmtree(self._trainer.folder(index), ignore_errors=True)
        return f"held-out error {before:.4f} -> {after:.4f} in {epochs} epochs"

    def _module(self, index: int, block: nn.Module, scale: float) -> BlockModule:
        settings = self._trainer.settings
        return BlockModule(
            block,
            self._hidden.outputs,
            lambda batch_size, seq_len: self._model.arguments(index, batch_size, seq_len),
            scale,
            settings.learning_rate,
            settings.plateau_patience,
        )

    def _compressed(self, index: int) -> nn.Module:
        return finetuned.load_compressed_block(self._model, self._store, index)

    def _trained(self, index: int, path: str) -> nn.Module:
        """Return the block of a Trainer's checkpoint, rounded to its stored types."""
        state = read_checkpoint(path)["state_dict"]
        trained = {name.removeprefix("block."): tensor for name, tensor in state.items() if name.startswith("block.")}
        block = self._compressed(index)
        block.load_state_dict(trained)
        block.load_state_dict(stored_state(block))
        return block

    @torch.no_grad()
    def _mean_square(self, index: int, data: BlockData, block: nn.Module | None) -> float:
        """Return the held-out mean square of target minus output, with a block or without any."""
        rows, device = data.held_out[self._ranks.rank :: self._ranks.world_size], self._model.device
        total = torch.zeros((), dtype=torch.float64)
        for row in rows:
            hidden, target = data.inputs.take([row]), data.targets.take([row]).to(device)
            output = self._hidden.forward(block, index, hidden)
            total += (output.float() - target.float()).square().mean().double().cpu()
        return float(sum(self._ranks.gather(total))) / len(data.held_out)
