"""The needs of the stages of a plan under a Trainer's settings, and how they are shown."""

import logging
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.table import Table

from nowag_pl.compressors.budget import settings_of
from nowag_pl.lit.datamodule import TokenDataModule, data_of
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import trains_end_to_end
from nowag_pl.pipeline.block_needs import (
    StageNeeds,
    budget_needs,
    calibration_needs,
    candidate_bytes,
    compression_needs_in_mode,
    export_needs,
    finetuning_needs,
    num_streams,
    reference_needs,
    teacher_needs,
    validation_needs,
)
from nowag_pl.pipeline.preflight import Available, host_bytes, shortages
from nowag_pl.pipeline.sizes import ModelSizes
from nowag_pl.pipeline.whole_needs import Holding, Training, training_needs, whole_validation_needs
from nowag_pl.run.wording import readable

_log = logging.getLogger("nowag_pl")


def stages_of_fit(module: LitCausalLM, trainer: Trainer) -> list[StageNeeds]:
    """Return the needs of every stage that the plan of a module holds, in their order."""
    plan, data = module.plan, data_of(trainer)
    if plan.compression is None:
        sizes = ModelSizes.as_it_is(module.checkpoint)
    else:
        sizes = ModelSizes.of(module.run.model, plan.compression.compressor)
    stages = _stages_of_compression(sizes, module, data)
    if plan.finetuning is not None:
        settings = plan.finetuning
        num_sequences, streams = settings.num_sequences + settings.num_held_out, num_streams(settings.targets)
        batch_size, in_memory = ceil(settings.batch_size / trainer.world_size), settings.activations == "memory"
        stages.append(finetuning_needs(sizes, num_sequences, data.seq_len, batch_size, in_memory, streams))
    if plan.report is not None:
        if sizes.is_compressed_here:
            windows = {name: len(tokens) for name, tokens in data.eval_windows.items()}
            stages.append(reference_needs(sizes, windows, data.seq_len, plan.report.batch_size))
        stages.append(stage_of_validation(sizes, module, trainer))
    finetunes = plan.finetuning is not None or trains_end_to_end(trainer)
    num_copies = (plan.compression is not None) + finetunes
    if plan.export is not None and num_copies:
        stages.append(export_needs(sizes, num_copies, plan.export.dense))
    return [*stages, *_stages_of_training(sizes, module, trainer)]


def _stages_of_compression(sizes: ModelSizes, module: LitCausalLM, data: TokenDataModule) -> list[StageNeeds]:
    """Return the needs of calibration, of compression, and of the budget's measurements."""
    calibration, compression = module.plan.calibration, module.plan.compression
    if calibration is None or compression is None:
        return []
    num_sequences, batch_size = calibration.num_sequences, calibration.batch_size
    of_calibration = calibration_needs(sizes, num_sequences, data.seq_len, batch_size)
    stages = [of_calibration, compression_needs_in_mode(sizes, of_calibration, calibration.mode)]
    if (budget := compression.budget) is not None:
        blocks = candidate_bytes(module.run.model, settings_of(compression.compressor, budget))
        num_sequences = min(budget.num_sequences, num_sequences)
        stages.append(budget_needs(sizes, blocks, num_sequences, data.seq_len, batch_size))
    return stages


def stage_of_validation(sizes: ModelSizes, module: LitCausalLM, trainer: Trainer) -> StageNeeds:
    """Return the needs of measuring perplexity before any end-to-end training."""
    data, holding = data_of(trainer), _holding(trainer)
    if holding.sharded or module.random_init:
        widened = holding.sharded and trainer.max_epochs != 0
        return whole_validation_needs(sizes, data.seq_len, data.eval_batch_size, holding, widened)
    windows = {name: len(tokens) for name, tokens in data.eval_windows.items()}
    return validation_needs(sizes, windows, data.seq_len, data.eval_batch_size)


def _stages_of_training(sizes: ModelSizes, module: LitCausalLM, trainer: Trainer) -> list[StageNeeds]:
    """Return the needs of end-to-end training and of its teacher; none where there is no such training."""
    if not trains_end_to_end(trainer):
        return []
    data, teacher, stages = data_of(trainer), module.objective.teacher, []
    if teacher is not None:
        num_windows = len(data.train_windows)
        stages.append(teacher_needs(sizes, num_windows, data.seq_len, teacher.batch_size, teacher.top_k))
    checkpoints = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    count = sum(_num_checkpoints(each, trainer) for each in checkpoints)
    training = Training(data.seq_len, data.train_batch_size, data.eval_batch_size, teacher is not None, count)
    return [*stages, training_needs(sizes, training, _holding(trainer))]


def show(stages: Sequence[StageNeeds], folder: Path, device: torch.device, num_processes: int = 1) -> None:
    """Print the needs beside the available memory and disk, and warn where they do not fit.

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


def _holding(trainer: Trainer) -> Holding:
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return Holding(trainer.world_size, sharded, str(trainer.precision) != "32-true")


def _num_checkpoints(callback: ModelCheckpoint, trainer: Trainer) -> int:
    """Return how many checkpoints a callback keeps; one after each epoch where it keeps all."""
    kept = callback.save_top_k if callback.save_top_k >= 0 else max(trainer.max_epochs or 1, 1)
    return kept + bool(callback.save_last)


def _table(stages: Sequence[StageNeeds], available: Available, num_processes: int) -> Table:
    """Lay out the needs; the last row holds the available memory and disk."""
    table = Table(title="Expected at most, beside the present use of the process")
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
