"""When linears are compressed: while a fit is set up, after calibration, before anything is wrapped."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.compressors import Compressor, NoWagPruner
from nowag_pl.compressors.budget import Budget, settings_of
from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.stages.plan import CompressionSettings, Plan

_DEFAULT = NoWagPruner()


class ModelCompression(Stage):
    """Compress every linear of every decoder block by one method.

    Args:
        compressor: the method, by class_path and init_args: NoWagPruner, NoWagQuantizer, WandaPruner,
            MagnitudePruner, or any class with their `compress`.
        budget: spread the bits that the compressor needs over the linears by measured sensitivity. null: the same
            settings for every linear.
        enabled: compress the model; false to train or measure it as it is.
    """

    def __init__(self, compressor: Compressor = _DEFAULT, budget: Budget | None = None, enabled: bool = True) -> None:
        if budget is not None:
            settings_of(compressor, budget)
        self.settings = CompressionSettings(compressor, budget)
        self.enabled = enabled
        self._done = False
        self._logged = False

    def announce(self, plan: Plan) -> None:
        """Enter the compression, if there is any."""
        if self.enabled:
            plan.compression = self.settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compress, once, and let the module build its model from the result."""
        module = module_of(pl_module)
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        module.run.compress(self.settings.compressor, self.settings.budget)
        module.compressed = module.run.compressed()
        self._done = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log every linear once, with the block as the step, so that depth is the horizontal axis."""
        module = module_of(pl_module)
        if not self._done or self._logged or not trainer.is_global_zero:
            return
        for row in module.run.statistics():
            linear = row["name"].partition(f".{row['block']}.")[2]
            keys = ("loss", "sparsity", "bits_per_weight", "codebook_use")
            scalars: dict[str, Any] = {f"{key}/{linear}": row[key] for key in keys if key in row}
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=row["block"])
        self._logged = True
