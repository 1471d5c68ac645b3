"""What the stages that no callback runs will need under a Trainer's settings, and how all needs are shown."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.table import Table

from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.pipeline.block_needs import StageNeeds, teacher_needs, validation_needs
from nowag_pl.pipeline.preflight import Available, host_bytes, shortages
from nowag_pl.pipeline.sizes import ModelSizes
from nowag_pl.pipeline.whole_needs import Holding, Training, training_needs, whole_validation_needs
from nowag_pl.run.wording import readable

if TYPE_CHECKING:
    from nowag_pl.lit.module import LitCausalLM

_log = logging.getLogger("nowag_pl")


def trains_end_to_end(trainer: Trainer) -> bool:
    """Tell whether a fit trains the whole model after its other stages."""
    return trainer.max_epochs != 0 and trainer.max_steps != 0


def stage_of_validation(sizes: ModelSizes, trainer: Trainer) -> StageNeeds:
    """Return the needs of measuring perplexity before any end-to-end training."""
    module, data = _parts(trainer)
    holding = _holding(trainer)
    if holding.sharded or module.random_init:
        widened = holding.sharded and trainer.max_epochs != 0
        return whole_validation_needs(sizes, data.seq_len, data.eval_batch_size, holding, widened)
    windows = {name: len(tokens) for name, tokens in data.eval_windows.items()}
    return validation_needs(sizes, windows, data.seq_len, data.eval_batch_size)


def stages_of_training(sizes: ModelSizes, trainer: Trainer) -> list[StageNeeds]:
    """Return the needs of end-to-end training and of what teaches in it; none where there is no such training."""
    if not trains_end_to_end(trainer):
        return []
    module, data = _parts(trainer)
    stages, distillation = [], module.distillation
    if distillation is not None:
        num_windows = len(data.train_windows)
        stages.append(teacher_needs(sizes, num_windows, data.seq_len, distillation.batch_size, distillation.top_k))
    checkpoints = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    count = sum(_num_checkpoints(each, trainer) for each in checkpoints)
    training = Training(data.seq_len, data.train_batch_size, data.eval_batch_size, distillation is not None, count)
    return [*stages, training_needs(sizes, training, _holding(trainer))]


def show(stages: Sequence[StageNeeds], folder: Path, device: torch.device, num_processes: int = 1) -> None:
    """Print the needs and what there is, and warn of each thing that does not fit.

    Args:
        stages: needs of the stages of one run.
        folder: run directory.
        device: of this process.
        num_processes: processes on this machine.
    """
    available = Available.here(folder, device)
    Console(stderr=True).print(_table(stages, available, num_processes))
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    for sentence in shortages(stages, available, num_processes, on_disk):
        _log.warning("Warning: %s", sentence)


def _parts(trainer: Trainer) -> tuple["LitCausalLM", TokenDataModule]:
    return cast("LitCausalLM", trainer.lightning_module), cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]


def _holding(trainer: Trainer) -> Holding:
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return Holding(trainer.world_size, sharded, str(trainer.precision) != "32-true")


def _num_checkpoints(callback: ModelCheckpoint, trainer: Trainer) -> int:
    """Return how many checkpoints a callback keeps; one after each epoch where it keeps all."""
    kept = callback.save_top_k if callback.save_top_k >= 0 else max(trainer.max_epochs or 1, 1)
    return kept + bool(callback.save_last)


def _table(stages: Sequence[StageNeeds], available: Available, num_processes: int) -> Table:
    """Lay out the needs, with what is available in the last row."""
    table = Table(title="Expected at most, beside what the process has now")
    for column in ("stage", "device memory", "host memory", "disk"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    on_device = available.device is not None
    for needs in stages:
        host = readable(host_bytes(needs, available, num_processes))
        table.add_row(needs.stage, readable(needs.device) if on_device else "", host, readable(needs.disk))
    table.add_section()
    table.add_row(
        "available",
        readable(available.device) if available.device is not None else "(is host memory)",
        readable(available.host),
        readable(available.disk),
    )
    return table
