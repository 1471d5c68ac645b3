"""When a run is refused whose settings are not those of the run directory: before anything is written or computed."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import PhasedTrainer, is_compressing
from nowag_pl.lit.settings import training_settings
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.lit.trainer_options import check_callbacks
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.compression_run import Texts, training_claim


class ClaimsCheck(Stage):
    """Compares the settings of every stage with those of the artefacts; the first callback of a fit."""

    def __init__(self) -> None:
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit is set up: check, once, when the texts are there.

        Raises:
            ValueError: the run directory holds artefacts made with other settings, or a weight is not finite.
        """
        module = module_of(pl_module)
        if self._done or module.run_dir is None or not is_compressing(trainer, stage):
            return
        self._done = True
        assert isinstance(trainer, PhasedTrainer)
        plan, data = module.plan, data_of(trainer)
        training = training_settings(trainer, module)
        if training is not None:
            _check_training(trainer, module, plan.compression is not None)
        if plan.compression is None or plan.calibration is None:
            if training is not None:
                claim = training_claim(training, {"model": module.checkpoint.path})
                ArtefactStore(Path(module.run_dir), Ranks.current()).check([claim])
            return
        calibration = data.calibration_windows(plan.calibration.num_sequences, plan.calibration.seed)
        finetuning = None
        if (settings := plan.finetuning) is not None:
            finetuning = data.finetuning_windows(settings.num_sequences, settings.num_held_out, settings.seed)
        module.run.check_claims(Texts(calibration, finetuning, data.bos), training)
        module.run.check_finite()


def _check_training(trainer: PhasedTrainer, module: LitCausalLM, compresses: bool) -> None:
    """Refuse what Lightning would refuse after hours of compression."""
    data = data_of(trainer)
    check_callbacks(trainer.callbacks, data.eval_names, compresses, module.objective.logged)
    interval, num_batches = trainer.options["val_check_interval"], len(data.train_dataloader())
    if isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and interval > num_batches:
        raise ValueError(
            f"Expected trainer.val_check_interval of at most {num_batches}, the batches of an epoch, but got "
            f"{interval}."
        )
