"""When the result is written as a model folder: after each validation of a fit."""

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import trains_end_to_end, validated_phase
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.models.format.card import add_figures
from nowag_pl.models.format.saving import save_compressed, save_dense
from nowag_pl.stages.plan import ExportSettings, Plan

_log = logging.getLogger("nowag_pl")
EXPORT = "export"  # folder in the run directory
EXPORT_FINETUNED = f"{EXPORT}_finetuned"


class ModelExport(Stage):
    """Write the compressed model to <run_dir>/export, and after finetuning another to <run_dir>/export_finetuned.

    Args:
        enabled: write the folders.
        format: "packed" with compressed linears, which nowag_pl reads; "dense" as an ordinary checkpoint of the dense
            model's size, with zeros or reconstructed weights, which other programs read.
    """

    def __init__(self, enabled: bool = True, format: Literal["packed", "dense"] = "packed") -> None:
        self.enabled = enabled
        self.settings = ExportSettings(dense=format == "dense")

    def announce(self, plan: Plan) -> None:
        """Enter the folders, if any are written."""
        if self.enabled:
            plan.export = self.settings

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank zero, if this run changed the model."""
        module, phase = module_of(pl_module), validated_phase(trainer)
        is_finetuned = phase in ("blockwise", "finetuned")
        is_changed = is_finetuned or (phase == "one_shot" and module.is_compressed_here)
        if not self.enabled or not module.run_dir or not is_changed:
            return
        folder = Path(module.run_dir) / (EXPORT_FINETUNED if is_finetuned else EXPORT)
        self._write(module, folder, trainer.is_global_zero)
        if trainer.is_global_zero:
            add_figures(folder, module.eval_metrics)
            _log.info("Model written to %s", folder)
            earlier = folder.with_name(EXPORT_FINETUNED)
            finetunes = module.plan.finetuning is not None or trains_end_to_end(trainer)
            if not finetunes and earlier.exists():
                _log.warning("%s is of an earlier command; its figures stay in the report", earlier)

    def _write(self, module: LitCausalLM, folder: Path, is_zero: bool) -> None:
        """Write the model in memory, or, where it is streamed, block after block; all ranks must call."""
        if module.model is None:
            if is_zero and module.compressed is not None:
                module.compressed.save(folder, self.settings.dense)
            return
        # A transformers model, whose type only the models may name.
        model: Any = module.whole_model()
        if is_zero:
            save = save_dense if self.settings.dense else save_compressed
            save(model, folder, source=module.checkpoint.path)
