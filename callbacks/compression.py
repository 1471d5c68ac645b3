"""When linears are compressed: while a fit is set up, after calibration, before anything is wrapped."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.compressors import Compressor, NoWagPruner
from nowag_pl.compressors.budget import Budget, settings_of
from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.stages.plan import CompressionSettings, Plan

_DEFAULT = NoWagPruner()
_VARYING = ("sparsity", "bits_per_weight", "codebook_use")


class ModelCompression(Stage):
    """Compress the linears of every decoder block.

    A pattern names linears: a glob for a whole name or its end (`model.layers.*.mlp.*`, `mlp.*`, `down_proj`), `re:`
    and a regular expression, or `blocks:` and numbers as Python counts them (`blocks:0`, `blocks:-1`, `blocks:2:10`).

    Args:
        compressor: the method, by class_path and init_args: NoWagPruner, NoWagQuantizer, NoWagTrellis, ArmorCompressor,
            SparseGPTPruner, WandaPruner, MagnitudePruner, or a class of your own that derives from
            nowag_pl.compressors.Compressor.
        budget: spread the bits that the compressor needs over the linears by measured sensitivity. null: the same
            settings for every linear.
        targets: patterns of the linears to compress, such as [mlp.*]. null: all.
        ignore: patterns of the linears that stay dense, such as ["blocks:0", "blocks:-1"]. null: none.
        overrides: for each pattern, other settings of the compressor, such as {down_proj: {sparsity: 0.3}}, or another
            compressor by class_path and init_args; if two patterns match, the later one applies. null: none.
        head: bits of each weight of the head, 1 to 8, such as 6: it is put on a trellis, and so are embeddings that are
            tied to it. null: it stays dense.
        enabled: compress the model. false: train or measure it as it is.
    """

    def __init__(
        self,
        compressor: Compressor = _DEFAULT,
        budget: Budget | None = None,
        targets: list[str] | None = None,
        ignore: list[str] | None = None,
        overrides: dict[str, Compressor | dict[str, Any]] | None = None,
        head: int | None = None,
        enabled: bool = True,
    ) -> None:
        if budget is not None:
            settings_of(compressor, budget)
        selected = None if targets is None else tuple(targets)
        self.settings = CompressionSettings(compressor, budget, selected, tuple(ignore or ()), overrides or {}, head)
        self.enabled = enabled
        self._done = False
        self._logged = False

    def announce(self, plan: Plan) -> None:
        """Enter which linears are compressed, and how."""
        plan.compression = self.settings if self.enabled else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit or a validation is set up: compress, once, and let the module build its model from it."""
        module = module_of(pl_module)
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        module.run.compress()
        module.compressed = module.run.compressed()
        self._done = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when a validation starts: log every linear once, with the block as the step.

        The loss of each, and of the other figures those that are not the same everywhere.
        """
        if not self._done or self._logged or not trainer.is_global_zero:
            return
        rows = module_of(pl_module).run.statistics()
        varying = [key for key in _VARYING if len({row.get(key) for row in rows}) > 1]
        for row in rows:
            linear = row["name"].partition(f".{row['block']}.")[2]
            scalars: dict[str, Any] = {
                f"within_linears/{key}/{linear}": row[key] for key in ("loss", *varying) if key in row
            }
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=row["block"])
        self._logged = True
