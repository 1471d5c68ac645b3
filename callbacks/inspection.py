"""When what compression did is drawn for TensorBoard: after each validation of a fit, on rank zero."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.module import LitCausalLM
from nowag_pl.lit.trainer import Phase, validated_phase
from nowag_pl.reports.views import Limits, block_errors, inspect_linears

if TYPE_CHECKING:
    from nowag_pl.reports.board import Board


class ModelInspection(Callback):
    """Draw weights, importance, masks, codewords, block errors and heat maps for TensorBoard.

    Args:
        enabled: whether to draw anything.
        max_blocks: blocks whose linears are drawn, the first and the last among them. TensorBoard shows at most ten
            images for each linear unless it is called with --samples_per_plugin=images=100.
        linears: draw only linears whose names end so, such as [mlp.down_proj]. null: all.
        max_image_size: pixels on a side of a matrix, each the mean of a cell.
        num_samples: weights in a histogram, and subvectors in a plane.
        num_windows: evaluation windows on which the error of each block's output is measured; every block is read
            for it twice. 0: not measured.
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
        least = {"max_blocks": 1, "max_image_size": 1, "num_samples": 1, "num_windows": 0}
        given = {
            "max_blocks": max_blocks,
            "max_image_size": max_image_size,
            "num_samples": num_samples,
            "num_windows": num_windows,
        }
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"Expected inspection.{name} of at least {least[name]}, but got {value}.")
        self.enabled = enabled
        self.limits = Limits(max_blocks, None if linears is None else tuple(linears), max_image_size, num_samples)
        self.num_windows = num_windows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what this phase has made."""
        module, phase = cast(LitCausalLM, pl_module), validated_phase(trainer)
        if not (self.enabled and trainer.is_global_zero and phase and module.is_compressed_here):
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                from nowag_pl.reports.board import Board  # which imports matplotlib

                board = Board(logger.experiment, Path(logger.log_dir))
                self._draw(board, module, cast(TokenDataModule, trainer.datamodule), phase)  # type: ignore[attr-defined]

    def _draw(self, board: "Board", module: LitCausalLM, data: TokenDataModule, phase: Phase) -> None:
        run = module.run
        rows = run.statistics()
        if phase == "one_shot":
            for view in inspect_linears(run, self.limits):
                board.linear(view)
            board.heat_maps(rows)
        if phase == "blockwise":
            board.finetuning(run.store.folder / "finetuning", run.finetuning_statistics())
        if phase != "finetuned" and self.num_windows:
            assert module.compressed is not None
            windows = next(iter(data.eval_windows.values()))[: self.num_windows]
            board.block_errors(phase, block_errors(run.model, module.compressed.load_block, windows))
        board.summary(phase, f"{run.checkpoint.path}: {run.method}", rows, module.eval_metrics, data.seq_len)
        settings = {"model.path": run.checkpoint.path, "data.seq_len": data.seq_len} | run.settings
        board.hyperparameters(phase, settings, rows, module.eval_metrics)
