"""When a run's needs are shown and its methods are checked: while a fit or a validation is set up, before the rest."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import is_compressing, trains_end_to_end
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.needs import DataShape, Training, stages_of_fit, validation
from nowag_pl.reports.needs_table import show
from nowag_pl.stages.export import check_export_of_model, check_export_of_run
from nowag_pl.stages.sizes import Holding, ModelSizes, methods_of


class ModelPreflight(Stage):
    """Estimate device memory, host memory and disk for every stage, and name the option to change where one won't fit.

    A method that does not fit the shape of a linear, or the format of the export, is refused here, before anything is
    computed.

    Args:
        enabled: Run the preflight check.
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
        if is_compressing(trainer, stage):
            _check_export(module)
            if module.plan.compression is not None:
                module.run.check_rotation()
                module.run.check_guidance()
            methods = None if module.plan.compression is None else methods_of(module.run)
            sizes = ModelSizes.of(module.checkpoint, methods)
            stages = stages_of_fit(sizes, module.plan, data, holding, _training(trainer, module))
        else:
            stages = [validation(ModelSizes.of(module.checkpoint), data, holding)]
        if trainer.is_global_zero:
            folder = Path(module.run_dir or trainer.default_root_dir)
            show(stages, folder, trainer.strategy.root_device, max(trainer.num_devices, 1))


def _check_export(module: LitCausalLM) -> None:
    if module.plan.export is None or module.plan.export.format != "exl3":
        return
    if module.plan.compression is None:
        check_export_of_model(module.checkpoint)
    else:
        check_export_of_run(module.run)


def _data_shape(trainer: Trainer) -> DataShape:
    data = data_of(trainer)
    return DataShape(
        seq_len=data.seq_len,
        eval_windows={name: len(tokens) for name, tokens in data.eval_windows.items()},
        eval_batch_size=data.eval_batch_size,
    )


def _holding(trainer: Trainer, module: LitCausalLM) -> Holding:
    sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    return Holding(
        num_ranks=trainer.world_size,
        sharded=sharded,
        mixed=str(trainer.precision) != "32-true",
        streams=not (sharded or module.random_init),
        widened=sharded and trainer.max_epochs != 0,
    )


def _training(trainer: Trainer, module: LitCausalLM) -> Training | None:
    if not trains_end_to_end(trainer):
        return None
    data, teacher = data_of(trainer), module.objective.teacher
    num_windows = 0 if teacher is None else len(data.train_windows)
    checkpoints = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    num_checkpoints = sum(_num_checkpoints(each, trainer) for each in checkpoints)
    return Training(data.train_batch_size, teacher, num_windows, num_checkpoints)


def _num_checkpoints(callback: ModelCheckpoint, trainer: Trainer) -> int:
    """Return the number of checkpoints that a callback keeps; one for each epoch if it keeps all."""
    kept = callback.save_top_k if callback.save_top_k >= 0 else max(trainer.max_epochs or 1, 1)
    return kept + bool(callback.save_last)
