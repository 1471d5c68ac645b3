"""When linears are compressed: while a fit is set up, after calibration, before anything is wrapped."""

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nowag_pl.compressors import Compressor, NoWagPruner
from nowag_pl.compressors.budget import Budget, settings_of
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.block_needs import (
    StageNeeds,
    budget_needs,
    candidate_bytes,
    compression_needs,
    compression_needs_in_mode,
)
from nowag_pl.pipeline.sizes import ModelSizes

_DEFAULT = NoWagPruner()


class ModelCompression(Callback):
    """Compress every linear of every decoder block by one method.

    Args:
        compressor: the method, by class_path and init_args: NoWagPruner, NoWagQuantizer, WandaPruner,
            MagnitudePruner, or any class with their `compress`.
        budget: spread the bits that the compressor needs over the linears by measured sensitivity. null: the same
            settings for every linear.
        enabled: whether to compress at all; false to train or measure a model as it is.
    """

    def __init__(self, compressor: Compressor = _DEFAULT, budget: Budget | None = None, enabled: bool = True) -> None:
        self.compressor = compressor
        self.budget = budget
        self._settings = [compressor] if budget is None else settings_of(compressor, budget)
        self.enabled = enabled
        self._done = False
        self._logged = False

    def needs(self, sizes: ModelSizes, trainer: Trainer) -> list[StageNeeds]:
        """Return what the stage will need."""
        if not self.enabled:
            return []
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        calibration = next((each for each in callbacks if getattr(each, "gathers_second_moments", False)), None)
        if calibration is None:
            return [compression_needs(sizes)]
        (of_calibration,) = calibration.needs(sizes, trainer)
        needs = [compression_needs_in_mode(sizes, of_calibration, calibration.mode)]
        if self.budget is not None:
            module, data = cast(LitCausalLM, trainer.lightning_module), cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
            blocks = candidate_bytes(module.run.model, self._settings)
            num_sequences = min(self.budget.num_sequences, calibration.num_sequences)
            needs.append(budget_needs(sizes, blocks, num_sequences, data.seq_len, calibration.batch_size))
        return needs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compress, once, and let the module build its model from the result."""
        module = cast(LitCausalLM, pl_module)
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        module.run.compress(self.compressor, self.budget)
        module.compressed = module.run.compressed()
        self._done = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every linear once, with the block as the step, so that depth is the horizontal axis."""
        module = cast(LitCausalLM, pl_module)
        if not self._done or self._logged or not trainer.is_global_zero:
            return
        for row in module.run.statistics():
            linear = row["name"].partition(f".{row['block']}.")[2]
            keys = ("loss", "sparsity", "bits_per_weight", "codebook_use")
            scalars: dict[str, Any] = {f"{key}/{linear}": row[key] for key in keys if key in row}
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=row["block"])
        self._logged = True
