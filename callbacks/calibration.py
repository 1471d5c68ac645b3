"""When second moments are gathered: while a fit is set up, before anything is wrapped."""

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.stages.plan import CalibrationMode, CalibrationSettings, Plan


class ModelCalibration(Stage):
    """Gather the second moments of every linear's input, block by block.

    Args:
        num_sequences: calibration sequences of data.seq_len tokens each, at random places of the calibration text.
        seed: which places.
        mode: "dense" for the inputs that linears have in the dense model, as in the paper; "propagated" for those
            they have after the blocks that are compressed already; "corrected" for those they have after all linears
            that are compressed already, with every linear fitted to give what the dense model has at its place.
        batch_size: sequences that pass a block together on each device; less memory where it is smaller.
        enabled: calibrate; on the command line it follows compression.enabled.
    """

    def __init__(
        self,
        num_sequences: int = 128,
        seed: int = 0,
        mode: CalibrationMode = "dense",
        batch_size: int = 8,
        enabled: bool = True,
    ) -> None:
        self.settings = CalibrationSettings(num_sequences, seed, mode, batch_size)
        self.enabled = enabled
        self._done = False

    def announce(self, plan: Plan) -> None:
        """Enter the calibration, if there is any."""
        if self.enabled:
            plan.calibration = self.settings

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calibrate, once, if this run compresses."""
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        settings = self.settings
        windows = data_of(trainer).calibration_windows(settings.num_sequences, settings.seed)
        module_of(pl_module).run.calibrate(windows, settings.mode, settings.seed, settings.batch_size)
        self._done = True
