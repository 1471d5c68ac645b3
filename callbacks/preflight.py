"""When a run's needs are shown and its methods are checked: while a fit or a validation is set up, before the rest."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import is_compressing, trains_end_to_end
from nowag_pl.lit.sharding import check_shardable
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.needs import (
    DataShape,
    StageNeeds,
    Training,
    calibration_stages,
    reference,
    stages_of_fit,
    validation,
)
from nowag_pl.reports.needs_table import Available, fits, show
from nowag_pl.stages.beginnings import compare_beginnings
from nowag_pl.stages.export import check_export_of_model, check_export_of_run
from nowag_pl.stages.plan import DEFAULT_BATCH
from nowag_pl.stages.sizes import Holding, ModelSizes, methods_of

BATCHES = (8, 4, 2, 1)
_log = logging.getLogger("nowag_pl")


class ModelPreflight(Stage):
    """Estimate device memory, host memory and disk for every stage, and name the option to change where one won't fit.

    It measures a small sample with and without the beginning-of-sequence token, and warns where another data.bos would
    halve the perplexity. A method that does not fit the shape of a linear, or the format of the export, is refused
    here, before anything is compressed.

    Args:
        enabled: make these estimates and checks.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit or a validation is set up: look ahead, once.

        Raises:
            ValueError: a method does not fit the shape of a linear, or the format of the export; the message names it.
        """
        if not self.enabled or self._done:
            return
        self._done = True
        module = module_of(pl_module)
        data, holding = _data_shape(trainer), _holding(trainer, module)
        compressing = is_compressing(trainer, stage)
        _check_head(module, holding)
        if compressing:
            _check_export(module)
            if module.plan.compression is not None:
                module.run.check_rotation()
                module.run.check_guidance()
                if module.is_sharded:
                    check_shardable(*module.run.dense.blocks)
            methods = None if module.plan.compression is None else methods_of(module.run)
            sizes = ModelSizes.of(module.checkpoint, methods)
            data = _choose_batches(trainer, module, sizes, data, holding)
            stages = stages_of_fit(sizes, module.plan, data, holding, _training(trainer, module))
        else:
            sizes = ModelSizes.of(module.checkpoint)
            data = _choose_batches(trainer, module, sizes, data, holding)
            stages = [validation(sizes, data, holding)]
        if trainer.is_global_zero:
            _check_beginnings(trainer, module, compressing)
            folder = Path(module.run_dir or trainer.default_root_dir)
            show(stages, folder, trainer.strategy.root_device, max(trainer.num_devices, 1))


def _check_head(module: LitCausalLM, holding: Holding) -> None:
    """Raise ValueError where a compressed head, whose embeddings may be tied to it, would be sharded."""
    described = module.checkpoint.compressed_linears
    is_asked_for = module.plan.compression is not None and module.plan.compression.head is not None
    if holding.sharded and holding.num_ranks > 1 and (is_asked_for or any("head" in name for name in described)):
        raise ValueError(
            "Expected a dense head where the model is sharded (FSDP2), but compression.head compresses it. Use DDP, or "
            "compression.head=null."
        )


def _check_export(module: LitCausalLM) -> None:
    if module.plan.export is None or module.plan.export.format != "exl3":
        return
    if module.plan.compression is None:
        check_export_of_model(module.checkpoint)
    else:
        check_export_of_run(module.run)


def _check_beginnings(trainer: Trainer, module: LitCausalLM, compressing: bool) -> None:
    """Warn where the other place of the beginning-of-sequence token would halve the perplexity."""
    data, token = data_of(trainer), module.checkpoint.tokenizer.bos_token_id
    windows = next(iter(data.eval_windows.values()))
    if token is None or module.random_init or windows.shape[1] < 3:
        return
    # All ranks begin a run together, where there is one.
    is_begun = compressing and module.plan.compression is not None
    model = module.run.model if is_begun else StreamedModel(module.checkpoint, trainer.strategy.root_device)
    advice = compare_beginnings(model, model.load_block, windows, token).advice(data.bos)
    if advice is not None:
        _log.warning("Warning: %s", advice)


def _data_shape(trainer: Trainer) -> DataShape:
    data = data_of(trainer)
    return DataShape(
        seq_len=data.seq_len,
        eval_windows={name: len(tokens) for name, tokens in data.eval_windows.items()},
        eval_batch_size=data.eval_batch_size,
        eval_chunk_bytes=data.eval_chunk_mib * 2**20,
    )


def _choose_batches(
    trainer: Trainer, module: LitCausalLM, sizes: ModelSizes, data: DataShape, holding: Holding
) -> DataShape:
    """Lower the batch sizes that were not given until the stages fit, the same on all ranks."""
    plan, datamodule = module.plan, data_of(trainer)
    folder = Path(module.run_dir or trainer.default_root_dir)
    available, num_processes = Available.here(folder, trainer.strategy.root_device), max(trainer.num_devices, 1)

    def chosen(option: str, needs: Callable[[int], Sequence[StageNeeds]]) -> int:
        sizes_that_fit = (
            size for size in BATCHES if all(fits(stage, available, num_processes) for stage in needs(size))
        )
        size: int = trainer.strategy.broadcast(next(sizes_that_fit, 1))
        if size != DEFAULT_BATCH and trainer.is_global_zero:
            _log.info("%s=%d, as more at a time may not fit", option, size)
        return size

    if sizes.is_compressed_here and plan.calibration is not None and "calibration" in plan.free_batches:
        size = chosen("calibration.batch_size", partial(calibration_stages, sizes, plan, data.seq_len))
        plan.calibration = dataclasses.replace(plan.calibration, batch_size=size)
    if plan.report is not None and sizes.is_compressed_here and "report" in plan.free_batches:
        size = chosen("report.batch_size", lambda size: [reference(sizes, data, size)])
        plan.report = dataclasses.replace(plan.report, batch_size=size)
    if datamodule.has_free_batch:
        size = chosen(
            "data.eval_batch_size",
            lambda size: [validation(sizes, dataclasses.replace(data, eval_batch_size=size), holding)],
        )
        datamodule.eval_batch_size = size
    return dataclasses.replace(data, eval_batch_size=datamodule.eval_batch_size)


def _holding(trainer: Trainer, module: LitCausalLM) -> Holding:
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return Holding(
        num_ranks=trainer.world_size,
        sharded=sharded,
        mixed=str(trainer.precision) != "32-true",
        streams=not (sharded or module.random_init),
        widened=sharded and trainer.max_epochs != 0,
        random=module.random_init,
    )


def _training(trainer: Trainer, module: LitCausalLM) -> Training | None:
    if not trains_end_to_end(trainer):
        return None
    data, teacher = data_of(trainer), module.objective.teacher
    num_windows = 0 if teacher is None else len(data.train_windows)
    checkpoints = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    num_checkpoints = sum(_num_checkpoints(each, trainer) for each in checkpoints)
    return Training(data.train_batch_size, teacher, num_windows, num_checkpoints, module.recompute)


def _num_checkpoints(callback: ModelCheckpoint, trainer: Trainer) -> int:
    """Return the number of checkpoints that a callback keeps; one for each epoch if it keeps all."""
    kept = callback.save_top_k if callback.save_top_k >= 0 else max(trainer.max_epochs or 1, 1)
    return kept + bool(callback.save_last)
