"""When a run's needs are shown and its method is checked: while a fit or a validation is set up, before the rest."""

from pathlib import Path
from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.preflight import show, stage_of_validation, stages_of_training
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.block_needs import StageNeeds
from nowag_pl.pipeline.sizes import ModelSizes


class ModelPreflight(Callback):
    """Show what each stage will need and what there is, warn where it is too little, refuse what does not fit a linear.

    What a stage needs is said by the callback that runs it, in `needs`.

    Args:
        enabled: whether to do so.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look ahead, once.

        Raises:
            ValueError: the method does not fit the shape of a linear; the message names it.
        """
        if not self.enabled or self._done:
            return
        self._done = True
        module = cast(LitCausalLM, pl_module)
        if is_compressing(trainer, stage):
            stages = _stages_of_fit(module, trainer)
        else:
            stages = [stage_of_validation(ModelSizes.as_it_is(module.checkpoint), trainer)]
        if trainer.is_global_zero:
            folder = Path(module.run_dir or trainer.default_root_dir)
            show(stages, folder, trainer.strategy.root_device, max(trainer.num_devices, 1))


def _stages_of_fit(module: LitCausalLM, trainer: Trainer) -> list[StageNeeds]:
    """Ask every callback, and add what comes behind their stages."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    compression = next((each for each in callbacks if hasattr(each, "compressor") and each.enabled), None)
    if compression is None:
        sizes = ModelSizes.as_it_is(module.checkpoint)
    else:
        sizes = ModelSizes.of(module.run.model, compression.compressor)
    of_callbacks = [each.needs(sizes, trainer) for each in callbacks if hasattr(each, "needs")]
    return [*(needs for stages in of_callbacks for needs in stages), *stages_of_training(sizes, trainer)]
