"""When the model is rotated: while a fit is set up, before calibration."""

from typing import Literal

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.phases import is_compressing
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.stages.plan import Plan, RotationSettings


class ModelRotation(Stage):
    """Rotate the model before it is compressed; it stays an ordinary model that computes the same.

    Args:
        kind: "learned" concentrates the importance of weights, so that pruning loses less; "hadamard" spreads it
            evenly, which may suit quantizers; "none" compresses the model as it is.
        stream: rotate the residual stream, by one matrix that is multiplied into embeddings, blocks and head. A head
            that is tied to the embeddings becomes a matrix of its own.
        values: rotate the values of each attention, head by head, which costs nothing.
        num_steps: steps of learning each matrix.
        learning_rate: learning rate of Adam at the first step; it falls to zero.
        blocks_per_step: number of blocks on which the matrix of the stream is learned at each step.
        seed: seed of the signs of "hadamard", and of the choice of blocks.
        enabled: Rotate. On the command line, compression.enabled decides this.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the command line
        self,
        kind: Literal["learned", "hadamard", "none"] = "none",
        stream: bool = True,
        values: bool = True,
        num_steps: int = 100,
        learning_rate: float = 1e-2,
        blocks_per_step: int = 4,
        seed: int = 0,
        enabled: bool = True,
    ) -> None:
        self.settings: RotationSettings | None = None
        if kind != "none":
            self.settings = RotationSettings(kind, stream, values, num_steps, learning_rate, blocks_per_step, seed)
        self.enabled = enabled
        self._done = False

    def announce(self, plan: Plan) -> None:
        """Enter how the model is rotated."""
        plan.rotation = self.settings if self.enabled else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when a fit or a validation is set up: rotate, once, if this run compresses."""
        run_plan = module_of(pl_module).plan
        if run_plan.rotation is None or run_plan.calibration is None or self._done:
            return
        if not is_compressing(trainer, stage):
            return
        calibration = run_plan.calibration
        data = data_of(trainer)
        windows = data.calibration_windows(calibration.num_sequences, calibration.seed)
        module_of(pl_module).run.rotate(windows, data.bos)
        self._done = True
