"""Make figures, and turn them into pictures."""

from io import StringIO

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

DPI = 80


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: width in inches.
        height: height in inches.
    """
    return Figure(figsize=(width, height), dpi=DPI)


def to_pixels(figure: Figure) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """Return a figure as pixels `[height, width, 3]`."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def to_svg(figure: Figure) -> str:
    """Return a figure as an `<svg>` element, whose text stays text; the same bytes for the same figure."""
    text = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nowag_pl", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
