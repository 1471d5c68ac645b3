"""When compression is drawn for the loggers: after each validation of a fit, on rank zero."""

from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer

from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import Phase, validated_phase
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.reports.views import Limits, inspect_linears

if TYPE_CHECKING:
    from nowag_pl.reports.board import Board


class ModelInspection(Stage):
    """Draw weights, importance, masks, codewords, damage by block and heat maps for the loggers of the Trainer.

    TensorBoard gets all this; Weights & Biases, MLflow, Comet and Neptune get images and scalars.

    Args:
        enabled: draw all this, if there is a logger that takes images.
        max_blocks: number of blocks whose linears are drawn, including the first and the last. TensorBoard shows at
            most ten images for each linear unless it is called with --samples_per_plugin=images=100.
        linears: draw only linears whose names end in one of these, such as [mlp.down_proj]. null: all.
        max_image_size: largest side of the image of a matrix, in pixels; each pixel is the mean of a cell.
        num_samples: number of weights in a histogram, and of subvectors in a plot of codewords.
    """

    def __init__(
        self,
        enabled: bool = True,
        max_blocks: int = 3,
        linears: list[str] | None = None,
        max_image_size: int = 96,
        num_samples: int = 4000,
    ) -> None:
        self.enabled = enabled
        self.limits = Limits(max_blocks, None if linears is None else tuple(linears), max_image_size, num_samples)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the result of this phase."""
        module, phase = module_of(pl_module), validated_phase(trainer)
        if not (self.enabled and trainer.is_global_zero and phase and module.is_compressed_here and trainer.loggers):
            return
        # They import matplotlib, which takes a second.
        from nowag_pl.lit.shows import show_of
        from nowag_pl.reports.board import Board

        shown = [show for logger in trainer.loggers if (show := show_of(logger)) is not None]
        if shown:
            self._draw(Board(shown), module, data_of(trainer), phase)

    def _draw(self, board: "Board", module: LitCausalLM, data: TokenDataModule, phase: Phase) -> None:
        run = module.run
        rows = run.statistics()
        if phase == "one_shot":
            for view in inspect_linears(run, self.limits):
                board.linear(view)
            board.heat_maps(rows)
            if (experts := run.expert_statistics()) is not None:
                board.experts(experts)
        if phase == "blockwise":
            board.finetuning(run.finetuning_statistics())
        if phase in run.damage:
            board.damage(phase, run.damage[phase])
        board.summary(phase, f"{run.checkpoint.path}: {run.method}", rows, module.eval_metrics, data.seq_len)
        settings = {"model.path": run.checkpoint.path, "data.seq_len": data.seq_len} | run.settings
        board.hyperparameters(phase, settings, rows, module.eval_metrics)
