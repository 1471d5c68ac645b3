"""Names beside points, inside of their axes and apart from each other where there is room."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

_MOST_LETTERS = 44
_BESIDE = 5.0  # points between a point and its name
# Heights of a name above its point, in points: beside it, below and above, and ever farther.
_UP = (4.0, -11.0, 15.0, -22.0, 26.0, -33.0, 37.0, -44.0)


def place_labels(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write a name beside each point: where it covers least of the names and points before, and leaves the axes least.

    Args:
        axes: with its data and limits.
        points: name, x and y of each.
    """
    renderer = FigureCanvasAgg(axes.figure.get_figure(root=True)).get_renderer()
    room = axes.get_window_extent(renderer)
    scale = axes.figure.dpi / 72
    spots: Any = axes.transData.transform([(x, y) for _, x, y in points]) if points else []
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for (name, x, y), spot in zip(points, spots, strict=True):
        label = axes.annotate(shortened(name), (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8)
        size = label.get_window_extent(renderer)
        places: list[tuple[float, int, tuple[float, float], Bbox]] = []
        for up, across in product(_UP, (_BESIDE, -_BESIDE, 0.0)):
            # To the right of the point, to its left, or centred on it.
            shift = 0.0 if across > 0 else size.width / scale if across < 0 else size.width / scale / 2
            left, bottom = spot[0] + (across - shift) * scale, spot[1] + up * scale
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            outside = sum(
                max(0.0, excess) for excess in (room.x0 - box.x0, room.y0 - box.y0, box.x1 - room.x1, box.y1 - room.y1)
            )
            covered = sum(_area(box, other) for other in taken)
            places.append((outside * size.height + covered, len(places), (across - shift, up), box))
        _, _, offset, box = min(places)
        label.set_position(offset)
        taken.append(box)


def shortened(name: str) -> str:
    """Return a name without its middle, if it is long.

    Example:
        >>> shortened("a" * 40 + "b" * 40)
        'aaaaaaaaaaaaaaaaaaaaaa…bbbbbbbbbbbbbbbbbbbbb'
    """
    if len(name) <= _MOST_LETTERS:
        return name
    half = _MOST_LETTERS // 2
    return f"{name[:half]}…{name[-(half - 1) :]}"


def _area(one: Bbox, other: Bbox) -> float:
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else common.width * common.height
