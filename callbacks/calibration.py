"""When second moments are gathered: while a fit is set up, before anything is wrapped."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer

from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import is_compressing
from nowag_pl.pipeline.block_needs import StageNeeds, calibration_needs
from nowag_pl.pipeline.sizes import ModelSizes
from nowag_pl.stages.calibration import CalibrationMode


class ModelCalibration(Callback):
    """Gather the second moments of every linear's input, block by block.

    Args:
        num_sequences: calibration sequences of data.seq_len tokens each, at random places of the calibration text.
        seed: which places.
        mode: "dense" for the inputs that linears have in the dense model, as in the paper; "propagated" for those
            they have behind the blocks that are compressed already; "corrected" for those they have behind all linears
            that are compressed already, with every linear fitted to give what the dense model has at its place.
        batch_size: sequences that pass a block together on each device; less memory where it is smaller.
        enabled: whether to calibrate; on the command line, compression.enabled says it.

    Attributes:
        gathers_second_moments: by this a callback is found that needs what calibration needs.
    """

    gathers_second_moments = True

    def __init__(
        self,
        num_sequences: int = 128,
        seed: int = 0,
        mode: CalibrationMode = "dense",
        batch_size: int = 8,
        enabled: bool = True,
    ) -> None:
        for name, value in {"num_sequences": num_sequences, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"Expected calibration.{name} of at least 1, but got {value}.")
        self.num_sequences = num_sequences
        self.seed = seed
        self.mode: CalibrationMode = mode
        self.batch_size = batch_size
        self.enabled = enabled
        self._done = False

    def needs(self, sizes: ModelSizes, trainer: Trainer) -> list[StageNeeds]:
        """Return what the stage will need."""
        if not self.enabled:
            return []
        seq_len = cast(TokenDataModule, trainer.datamodule).seq_len  # type: ignore[attr-defined]
        return [calibration_needs(sizes, self.num_sequences, seq_len, self.batch_size)]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Calibrate, once, if this run compresses."""
        module = cast(LitCausalLM, pl_module)
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        data = cast(TokenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        windows = data.calibration_windows(self.num_sequences, self.seed)
        module.run.calibrate(windows, self.mode, self.seed, self.batch_size)
        self._done = True
