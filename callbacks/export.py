"""When the result is written as a model folder: after each validation of a fit."""

import logging
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.preflight import trains_end_to_end
from nowag_pl.lit.trainer import finetunes_blocks, validated_phase
from nowag_pl.models.format.saving import save_compressed, save_dense
from nowag_pl.pipeline.block_needs import StageNeeds, export_needs
from nowag_pl.pipeline.sizes import ModelSizes

_log = logging.getLogger("nowag_pl")
EXPORT = "export"  # folder in the run directory


class ModelExport(Callback):
    """Write the compressed model to <run_dir>/export, and after finetuning another to <run_dir>/export_finetuned.

    Args:
        enabled: whether to write it.
        format: "packed" with compressed linears, which nowag_pl reads; "dense" as an ordinary checkpoint of the dense
            model's size, with zeros or reconstructed weights, which other programs read.
    """

    def __init__(self, enabled: bool = True, format: Literal["packed", "dense"] = "packed") -> None:
        self.enabled = enabled
        self.dense = format == "dense"

    def needs(self, sizes: ModelSizes, trainer: Trainer) -> list[StageNeeds]:
        """Return what the folders will need."""
        num_copies = sizes.is_compressed_here + _finetunes(trainer)
        return [export_needs(sizes, num_copies, self.dense)] if self.enabled and num_copies else []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder on rank zero, if this run changed the model."""
        module = cast(LitCausalLM, pl_module)
        phase = validated_phase(trainer)
        trained = phase in ("blockwise", "finetuned")
        if not (self.enabled and module.run_dir and (trained or (phase == "one_shot" and module.is_compressed_here))):
            return
        folder = Path(module.run_dir) / (f"{EXPORT}_finetuned" if trained else EXPORT)
        if module.model is not None:
            model = module.whole_model()
            if trainer.is_global_zero:
                save = save_dense if self.dense else save_compressed
                save(cast(Any, model), folder, source=module.checkpoint.path)
        elif trainer.is_global_zero and module.compressed is not None:
            module.compressed.save(folder, self.dense)
        if trainer.is_global_zero:
            _log.info("Model written to %s", folder)
            earlier = folder.with_name(f"{EXPORT}_finetuned")
            if not _finetunes(trainer) and earlier.exists():
                _log.warning("%s is of an earlier command; this report is without its figures", earlier)


def _finetunes(trainer: Trainer) -> bool:
    """Tell whether this command finetunes in any way."""
    return finetunes_blocks(trainer) or trains_end_to_end(trainer)
