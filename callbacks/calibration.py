"""When second moments are gathered: while a fit is set up, before anything is wrapped."""

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.stages.plan import DEFAULT_BATCH, CalibrationMode, CalibrationSettings, GuidanceSettings, Plan


class ModelCalibration(Stage):
    """Gather the second moments of every linear's input, block by block.

    Args:
        num_sequences: number of calibration sequences of data.seq_len tokens each, taken at random places of the
            calibration text.
        seed: seed of these places.
        mode: "dense" takes the inputs that linears have in the dense model, as in the paper; "propagated" those that
            they have after the blocks compressed so far; "corrected" those that they have after all linears compressed
            so far, and fits every linear to compensate for the error of those before it.
        batch_size: sequences that pass through a block together on each device; a smaller number takes less memory.
            null: 8, or as many as fit by the preflight's estimate.
        guidance: weight every token by the squared gradient of the final loss at each linear's output, which takes a
            forward and a backward pass. null: all tokens have equal weight.
        expert_shrinkage: in a model with experts, each of which sees only the tokens that are routed to it, the number
            of tokens that the moments over all tokens of the block count for in its own; 0 takes only its own, and a
            large number those over all tokens.
        enabled: Calibrate. On the command line, compression.enabled decides this.
    """

    def __init__(
        self,
        num_sequences: int = 128,
        seed: int = 0,
        mode: CalibrationMode = "dense",
        batch_size: int | None = None,
        guidance: GuidanceSettings | None = None,
        expert_shrinkage: float = 128.0,
        enabled: bool = True,
    ) -> None:
        self.settings = CalibrationSettings(
            num_sequences, seed, mode, DEFAULT_BATCH if batch_size is None else batch_size, guidance, expert_shrinkage
        )
        self._is_free = batch_size is None
        self.enabled = enabled
        self._done = False

    def announce(self, plan: Plan) -> None:
        """Enter how second moments are gathered."""
        plan.calibration = self.settings if self.enabled else None
        if self._is_free:
            plan.free_batches.add("calibration")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit or a validation is set up: calibrate, once, if this run compresses."""
        if not self.enabled or self._done or not is_compressing(trainer, stage):
            return
        data = data_of(trainer)
        windows = data.calibration_windows(self.settings.num_sequences, self.settings.seed)
        module_of(pl_module).run.calibrate(windows, data.bos)
        self._done = True
