"""What a logger of experiments can show. A subclass for each kind of logger says how."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Show(ABC):
    """Shows the pages of one run. Every logger has images and scalars; what it lacks besides is left out."""

    @abstractmethod
    def image(self, tag: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show an image.

        Args:
            tag: name; images of one name and different steps belong together.
            pixels: `[height, width, 3]`.
            step: such as the number of the block.
        """

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show numbers by their names."""

    def histogram(self, tag: str, values: Tensor, step: int) -> None:  # noqa: B027 - not every logger has them
        """Show how values are distributed."""

    def text(self, tag: str, markdown: str) -> None:  # noqa: B027
        """Show text."""

    def table_of_runs(  # noqa: B027
        self, settings: Mapping[str, str | int | float | bool], figures: Mapping[str, float], is_new: bool
    ) -> None:
        """Enter the run in a table of runs.

        Args:
            settings: of the run.
            figures: its results, which are shown as scalars as well.
            is_new: whether the run is not in the table yet.
        """
