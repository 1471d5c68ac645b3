"""Matrices as images: weights, importance, masks; and values over blocks and linears."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nowag_pl.reports.figures.canvas import DPI, new_figure

_MARGIN = 0.002  # share of the values on either side that the colours do not distinguish
_SIDE = 160  # pixels of a panel
_GAP = 66  # pixels between two panels, for the scale
_HEAD = 34  # pixels above a row, for its titles
_BAR = 8  # pixels: width of the scale
_EDGE = 16  # pixels beside and below a panel for the names of its sides
_MAP_WIDTH = 5.4  # inches
_MOST_WRITTEN = 10  # columns of a map whose values are written into its cells
_DARK = "#010101"  # black that stays so on a dark page


@dataclass(frozen=True)
class Panel:
    """One image of a grid.

    Attributes:
        title: above it.
        values: `[rows, columns]`, floating, or bool for a mask (True is dark).
        spec: format of a value at the scale.
        limits: values at the ends of the scale. None: nearly the smallest and the largest.
    """

    title: str
    values: Tensor
    spec: str = ".1f"
    limits: tuple[float, float] | None = None


def panel_figure(title: str, rows: Sequence[Sequence[Panel | None]]) -> Figure:
    """Lay out square panels in a grid, each with its scale.

    Pixels are set directly: axes would take ten times as long, and these figures come by the hundred.

    Args:
        title: of the whole figure.
        rows: panels from top to bottom, and from left to right; None leaves a gap.
    """
    width = max(len(row) for row in rows) * (_SIDE + _GAP) + 16 + _EDGE
    height = len(rows) * (_SIDE + _HEAD) + 36 + _EDGE
    figure = new_figure(width / DPI, height / DPI)
    figure.text(12 / width, 1 - 6 / height, title, va="top", fontsize=11, weight="bold")
    for row_number, row in enumerate(rows):
        bottom = height - 24 - (row_number + 1) * (_SIDE + _HEAD)
        middle = (bottom + _SIDE / 2) / height
        figure.text(_EDGE / width, middle, "out", fontsize=8, rotation=90, ha="right", va="center")
        below = rows[row_number + 1] if row_number + 1 < len(rows) else []
        for column, panel in enumerate(row):
            left = 12 + _EDGE + column * (_SIDE + _GAP)
            if panel is not None:
                _draw(figure, panel, left, bottom)
                if column >= len(below) or below[column] is None:
                    place = ((left + _SIDE / 2) / width, (bottom - 4) / height)
                    figure.text(*place, "in", fontsize=8, ha="center", va="top")
    return figure


def _draw(figure: Figure, panel: Panel, left: int, bottom: int) -> None:
    """Draw one panel, with its lower left corner at these pixels."""
    width, height = figure.bbox.size
    values = panel.values.cpu().numpy()
    pixels = values[np.ix_(*(np.arange(_SIDE) * size // _SIDE for size in values.shape))]
    figure.text(left / width, (bottom + _SIDE + 5) / height, panel.title, fontsize=9)
    if values.dtype == bool:
        figure.figimage(~pixels, left, bottom, cmap="gray", vmin=0, vmax=1)
        return
    low, high = panel.limits or color_limits(panel.values)
    figure.figimage(pixels, left, bottom, vmin=low, vmax=high)
    right = left + _SIDE + 5
    figure.figimage(np.linspace(1, 0, _SIDE)[:, None].repeat(_BAR, axis=1), right, bottom, vmin=0, vmax=1)
    for value, place, alignment in ((low, bottom, "bottom"), (high, bottom + _SIDE, "top")):
        text = format(value, panel.spec)
        figure.text((right + _BAR + 3) / width, place / height, text, fontsize=8, va=alignment)


def color_limits(values: Tensor) -> tuple[float, float]:
    """Return the ends of a scale, between which all values but the most extreme lie."""
    low, high = np.quantile(values.cpu().numpy(), [_MARGIN, 1 - _MARGIN])
    return float(low), float(high)


def heat_map_figure(
    maps: Sequence[tuple[str, Sequence[Sequence[float | None]], str]], rows: Sequence[str], column_label: str = "block"
) -> Figure:
    """Show values by linear and block, in maps one below the other, each with its own colours.

    Args:
        maps: title, values by row and column (None for no value), and the format of a value, such as ".3f".
        rows: their names.
        column_label: name of a column.
    """
    each = 0.26 * len(rows) + 0.95
    figure = new_figure(_MAP_WIDTH, each * len(maps))
    grid = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    height = each * len(maps)
    # Constrained layouts take a second: names and titles have places of a fixed size.
    figure.subplots_adjust(left=0.23, right=0.95, top=1 - 0.32 / height, bottom=0.5 / height, hspace=0.9 / (each - 0.9))
    for axes, (title, values, spec) in zip(grid, maps, strict=True):
        array = np.array([[np.nan if value is None else value for value in row] for row in values], dtype=float)
        image = axes.imshow(array, aspect="auto", interpolation="nearest")
        axes.set_title(title.capitalize(), fontsize=10, loc="left")
        axes.set_xlabel(column_label, fontsize=9)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=8)
        if array.shape[1] <= _MOST_WRITTEN:
            _write_values(axes, array, spec)
    return figure


def _write_values(axes: Axes, array: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", spec: str) -> None:
    """Write each value into its cell, light on dark and dark on light, whatever the colour of the page."""
    low, high = np.nanmin(array), np.nanmax(array)
    for (row, column), value in np.ndenumerate(array):
        if np.isfinite(value):
            light = high > low and (value - low) / (high - low) > 0.6
            colour = _DARK if light else "white"
            axes.text(column, row, format(value, spec), ha="center", va="center", fontsize=7, color=colour)
