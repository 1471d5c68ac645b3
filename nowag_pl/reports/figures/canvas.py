"""Make figures, and turn them into pictures."""

import re
from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text

from nowag_pl.run.wording import printable

DPI = 80


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: width in inches.
        height: height in inches.
    """
    return Figure(figsize=(width, height), dpi=DPI)


def plain_axes(figure: Figure, title: str, x_label: str, y_label: str) -> Axes:
    """Return the only axes of a figure, with a light grid and no frame above and to the right.

    Args:
        figure: an empty figure.
        title: of the figure.
        x_label: name and unit of x.
        y_label: name and unit of y.
    """
    axes = figure.subplots()
    figure.subplots_adjust(left=0.13, right=0.97, top=0.9, bottom=0.15)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="gray", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _take_names_literally(figure: Figure) -> None:
    """Keep a dollar sign in the name of a text or model from beginning a formula; labels of ticks stay formulas.

    Control characters, for which no font has a picture, are told by number.
    """
    for text in figure.findobj(Text):
        if not text.get_text().replace("\n", "").isprintable():
            text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
        if "$" in text.get_text() and "mathdefault" not in text.get_text():
            text.set_parse_math(False)


def to_pixels(figure: Figure) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Return a figure as pixels `[height, width, 3]`."""
    _take_names_literally(figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_svg(figure: Figure, on_white: bool = False) -> str:
    """Return a figure as an `<svg>` element, whose text stays text; the same bytes for the same figure.

    Args:
        figure: whose black lines and texts take the colour of the page's text, in light and dark, without a ground.
        on_white: black on white instead, for a file of its own.
    """
    _take_names_literally(figure)
    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_visible(on_white)
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nowag_pl", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    if not on_white:
        svg = re.sub(r"\b(fill|stroke): #000000", r"\1: currentColor", svg)
    return svg[svg.index("<svg") :]
