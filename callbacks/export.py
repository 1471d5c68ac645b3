"""When the result is written as a model folder: before each validation of a fit."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import Phase, is_compressing, phase_of, trains_end_to_end, validated_phase
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.models.adapters import save_adapters
from nowag_pl.models.format.card import add_figures
from nowag_pl.stages.plan import ExportFormat, ExportSettings, Plan

_log = logging.getLogger("nowag_pl")
EXPORT = "export"  # folder in the run directory
EXPORT_FINETUNED = f"{EXPORT}_finetuned"
ADAPTER = "adapter"  # the same, of a training of adapters


class ModelExport(Stage):
    """Write the compressed model to <run_dir>/export, and after finetuning another to <run_dir>/export_finetuned.

    Adapters that were trained in the place of the model are written to <run_dir>/adapter.

    Args:
        enabled: write the folders.
        format: "packed" with compressed linears, which nowag_pl reads; "dense" as an ordinary checkpoint of the dense
            model's size, with zeros or reconstructed weights, which other programs read; "exl3" for exllamav3, TabbyAPI
            and GPTQModel, where NoWagTrellis compressed the model with state_bits 16 and multiple 128.
    """

    def __init__(self, enabled: bool = True, format: ExportFormat = "packed") -> None:
        self.enabled = enabled
        self.settings = ExportSettings(format)

    def announce(self, plan: Plan) -> None:
        """Enter the folders, if any are written."""
        if self.enabled:
            plan.export = self.settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a validation of a fit is set up, after the stages before: write a model that lies in artefacts.

        It is measured afterwards, so that a crash there leaves the folder.
        """
        module, phase = module_of(pl_module), phase_of(trainer)
        if is_compressing(trainer, stage) and phase != "finetuned" and (folder := self._folder(module, phase)):
            assert module.compressed is not None
            if trainer.is_global_zero:
                module.compressed.save(folder, self.settings.format)
                _log.info("Model written to %s", folder)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a validation: write the model in memory, if it was trained end to end; all ranks take part."""
        module = module_of(pl_module)
        if validated_phase(trainer) == "finetuned" and module.adapters is not None:
            self._write_adapters(trainer, module)
        elif validated_phase(trainer) == "finetuned" and (folder := self._folder(module, "finetuned")):
            module.save(folder, self.settings.format)
            if trainer.is_global_zero:
                _log.info("Model written to %s", folder)

    def _write_adapters(self, trainer: Trainer, module: LitCausalLM) -> None:
        """Write the adapters beside the export of the model under them."""
        if not self.enabled or module.run_dir is None or not trainer.is_global_zero:
            return
        folder = Path(module.run_dir) / ADAPTER
        source = str(folder.with_name(EXPORT)) if module.is_compressed_here else module.checkpoint.path
        model: Any = module.model
        save_adapters(model, folder, source)
        _log.info("Adapters written to %s", folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the figures to the folder's card."""
        module, phase = module_of(pl_module), validated_phase(trainer)
        folder = None if phase is None else self._folder(module, phase)
        if folder is None or not trainer.is_global_zero:
            return
        add_figures(folder, module.eval_metrics)
        earlier = folder.with_name(EXPORT_FINETUNED)
        finetunes = module.plan.finetuning is not None or trains_end_to_end(trainer)
        if not finetunes and earlier.exists():
            _log.warning("%s is of an earlier command; its figures stay in the report", earlier)

    def _folder(self, module: LitCausalLM, phase: Phase) -> Path | None:
        """Return the folder to write, if this run changed the model."""
        if phase == "finetuned" and module.adapters is not None:
            return None
        is_changed = phase != "one_shot" or module.is_compressed_here
        if not self.enabled or not module.run_dir or not is_changed:
            return None
        return Path(module.run_dir) / (EXPORT if phase == "one_shot" else EXPORT_FINETUNED)
