"""How each of Lightning's loggers shows the pages of a run."""

from collections.abc import Mapping
from functools import singledispatch
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from torch import Tensor

from nowag_pl.reports.show import Show


class _LoggerShow(Show):
    """Scalars, which all loggers take alike."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self._logger.log_metrics(dict(values), step=step)


class TensorBoardShow(_LoggerShow):
    """Everything, in the one run of the logger."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an image."""
        self._logger.experiment.add_image(tag, pixels, step, dataformats="HWC")

    def histogram(self, tag: str, values: Tensor, step: int) -> None:
        """Add a histogram."""
        self._logger.experiment.add_histogram(tag, values.cpu(), step)

    def text(self, tag: str, markdown: str) -> None:
        """Add text."""
        self._logger.experiment.add_text(tag, markdown)

    def table_of_runs(
        self, settings: Mapping[str, str | int | float | bool], figures: Mapping[str, float], is_new: bool
    ) -> None:
        """Enter the run in HPARAMS.

        No "experiment" is declared: TensorBoard then combines the settings and figures of all runs that it finds.
        """
        from torch.utils.tensorboard.summary import hparams

        if is_new:
            _, start, end = hparams(dict(settings), dict(figures))
            for summary in (start, end):
                self._logger.experiment.file_writer.add_summary(summary)


class WandbShow(_LoggerShow):
    """Images and scalars of Weights & Biases."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image."""
        self._logger.log_image(tag, [pixels], step=step)


class MLFlowShow(_LoggerShow):
    """Images and scalars of MLflow."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image."""
        self._logger.experiment.log_image(self._logger.run_id, pixels, key=tag, step=step)


class CometShow(_LoggerShow):
    """Images and scalars of Comet."""

    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image."""
        self._logger.experiment.log_image(pixels, name=tag, step=step)


@singledispatch
def show_of(logger: Logger) -> Show | None:
    """Return what shows the pages of a run in a logger, or None if it takes no images, as CSVLogger.

    `show_of.register(MyLogger, MyShow)` adds a logger of your own.

    Args:
        logger: one of the Trainer's.
    """
    return None


show_of.register(TensorBoardLogger, TensorBoardShow)
show_of.register(WandbLogger, WandbShow)
show_of.register(MLFlowLogger, MLFlowShow)
show_of.register(CometLogger, CometShow)
