"""Make figures, and turn them into pictures."""

from io import StringIO

import numpy as np
from matplotlib import rc_context
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


def to_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element, whose text stays text; the same bytes for the same figure."""
    _take_names_literally(figure)
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nowag_pl", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
