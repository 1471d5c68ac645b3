"""When a run's needs are shown and its method is checked: while a fit or a validation is set up, before the rest."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.preflight import show, stage_of_validation, stages_of_fit
from nowag_pl.lit.stage import Stage, module_of
from nowag_pl.pipeline.sizes import ModelSizes


class ModelPreflight(Stage):
    """Show the memory and disk that each stage will need beside what there is, and warn where it is too little.

    A method that does not fit the shape of a linear is refused here, before anything is computed.

    Args:
        enabled: run the preflight check.
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
        module = module_of(pl_module)
        if is_compressing(trainer, stage):
            stages = stages_of_fit(module, trainer)
        else:
            stages = [stage_of_validation(ModelSizes.as_it_is(module.checkpoint), module, trainer)]
        if trainer.is_global_zero:
            folder = Path(module.run_dir or trainer.default_root_dir)
            show(stages, folder, trainer.strategy.root_device, max(trainer.num_devices, 1))
