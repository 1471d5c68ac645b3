"""When compression is drawn for TensorBoard: after each validation of a fit, on rank zero."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from nowag_pl.functional.ranges import check_whole
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.phases import Phase, validated_phase
from nowag_pl.lit.stage import Stage, data_of, module_of
from nowag_pl.reports.views import Limits, block_errors, inspect_linears

if TYPE_CHECKING:
    from nowag_pl.reports.board import Board


class ModelInspection(Stage):
    """Draw weights, importance, masks, codewords, block errors and heat maps for TensorBoard.

    Args:
        enabled: draw all this, if TensorBoard is the logger.
        max_blocks: number of blocks whose linears are drawn, including the first and the last. TensorBoard shows at
            most ten images for each linear unless it is called with --samples_per_plugin=images=100.
        linears: draw only linears whose names end in one of these, such as [mlp.down_proj]. null: all.
        max_image_size: largest side of the image of a matrix, in pixels; each pixel is the mean of a cell.
        num_samples: number of weights in a histogram, and of subvectors in a plot of codewords.
        num_windows: evaluation windows on which the error of each block's output is measured, for which every block is
            read twice. 0: not measured.
    """

    def __init__(
        self,
        enabled: bool = True,
        max_blocks: int = 3,
        linears: list[str] | None = None,
        max_image_size: int = 96,
        num_samples: int = 4000,
        num_windows: int = 2,
    ) -> None:
        check_whole("inspection.num_windows", num_windows, 0)
        self.enabled = enabled
        self.limits = Limits(max_blocks, None if linears is None else tuple(linears), max_image_size, num_samples)
        self.num_windows = num_windows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the result of this phase."""
        module, phase = module_of(pl_module), validated_phase(trainer)
        if not (self.enabled and trainer.is_global_zero and phase and module.is_compressed_here):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # It imports matplotlib, which takes a second.
                from nowag_pl.reports.board import Board

                self._draw(Board(logger.experiment, Path(logger.log_dir)), module, data_of(trainer), phase)

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
            board.finetuning(run.store.folder / "finetuning", run.finetuning_statistics())
        if phase != "finetuned" and self.num_windows:
            assert module.compressed is not None
            windows = next(iter(data.eval_windows.values()))[: self.num_windows]
            board.block_errors(phase, block_errors(run.model, module.compressed.load_block, windows))
        board.summary(phase, f"{run.checkpoint.path}: {run.method}", rows, module.eval_metrics, data.seq_len)
        settings = {"model.path": run.checkpoint.path, "data.seq_len": data.seq_len} | run.settings
        board.hyperparameters(phase, settings, rows, module.eval_metrics)
