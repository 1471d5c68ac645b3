"""Curves and clouds of points: subvectors with codewords, values over blocks and epochs, perplexity against bits."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor

from nowag_pl.reports.figures.canvas import new_figure, plain_axes
from nowag_pl.reports.figures.labels import place_labels

_POINTS, _CODEWORDS = "#7f9fc4", "#c0392b"
_WIDTH, _HEIGHT = 5.4, 3.2  # inches: two stand side by side on a page, one fills the width of a telephone
_LEGEND_COLUMNS = 3
_LEGEND_LETTERS, _SIGN_LETTERS = 84, 8  # that fit beside each other, and that the sign of a line takes
_FIRST, _LAST = 0.25, 0.9  # colours that show on white and on black
_MOST_NAMES = 12  # in a legend; more lines get a scale of colours
_MOST_MARKS = 40
_WIDE = 8  # ratio of values from which on they are drawn on a logarithmic scale


def codeword_figure(title: str, points: Tensor, codewords: Tensor, counts: Tensor) -> Figure:
    """Show subvectors in a plane with the codewords over them, and how often each codeword is used.

    Args:
        title: of the figure.
        points: subvectors in the plane `[n, 2]`.
        codewords: `[k, 2]`.
        counts: subvectors that each codeword stands for, `[k]`.
    """
    figure = new_figure(8.0, 4.0)
    figure.text(0.07, 0.95, title, fontsize=11, weight="bold", va="center")
    plane, usage = figure.add_axes((0.07, 0.12, 0.45, 0.72)), figure.add_axes((0.6, 0.12, 0.38, 0.72))
    plane.scatter(*points.T.cpu().numpy(), s=4, c=_POINTS, linewidths=0)
    used = (counts > 0).cpu()
    plane.scatter(*codewords[used].T.cpu().numpy(), s=9, c=_CODEWORDS, linewidths=0)
    in_use = f"{int(used.sum()):,} of {len(codewords):,} codewords in use"
    for place, text, colour in ((0.07, f"{len(points):,} subvectors", _POINTS), (0.25, in_use, _CODEWORDS)):
        figure.text(place, 0.87, text, fontsize=8, color=colour)
    plane.set_xlabel("first principal axis", fontsize=8)
    plane.set_ylabel("second principal axis", fontsize=8)
    ordered = counts.sort(descending=True).values.cpu().numpy()
    usage.fill_between(range(len(ordered)), ordered, step="mid", color=_CODEWORDS, alpha=0.7)
    usage.set_xlabel("codewords, by use", fontsize=8)
    usage.set_ylabel("subvectors", fontsize=8)
    usage.set_ylim(bottom=0)
    for axes in (plane, usage):
        axes.locator_params(nbins=4)
        axes.tick_params(labelsize=7)
    return figure


def line_figure(
    title: str,
    lines: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    emphasised: str | None = None,
    ordered: bool = False,
) -> Figure:
    """Draw values over whole numbers from 0 on, one line for each name.

    Args:
        title: of the figure.
        lines: name to values.
        x_label: name of the counted things.
        y_label: name and unit of the values.
        emphasised: name of a line that is drawn thick, in the colour of text.
        ordered: the names have an order, such as blocks, and get colours that show it.
    """
    longest = max(map(len, lines), default=0)
    columns = max(1, min(_LEGEND_COLUMNS, len(lines), _LEGEND_LETTERS // (longest + _SIGN_LETTERS)))
    num_rows = -(-len(lines) // columns) if 1 < len(lines) <= _MOST_NAMES else 0
    height = _HEIGHT + 0.2 * num_rows
    figure = new_figure(_WIDTH, height)
    axes = plain_axes(figure, title, x_label, y_label)
    figure.subplots_adjust(top=1 - 0.32 / height, bottom=(0.5 + 0.2 * num_rows) / height)
    colours = colormaps["viridis" if ordered else "tab10"]
    for number, (name, values) in enumerate(lines.items()):
        place = _FIRST + (_LAST - _FIRST) * number / max(len(lines) - 1, 1)
        colour = colours(place if ordered else number % 10)
        style: Any = {"color": "black", "linewidth": 2.4} if name == emphasised else {"color": colour, "linewidth": 1.3}
        axes.plot(range(len(values)), values, marker="." if len(values) <= _MOST_MARKS else "", label=name, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if num_rows:
        figure.legend(fontsize=8, loc="lower center", ncols=columns, frameon=False, columnspacing=1, handlelength=1.4)
    elif ordered and len(lines) > 1:
        step = (len(lines) - 1) / (_LAST - _FIRST)
        scale = ScalarMappable(Normalize(-_FIRST * step, (1 - _FIRST) * step), colours)
        figure.colorbar(scale, ax=axes, label="block", boundaries=range(len(lines) + 1))
    return figure


def scatter_figure(
    title: str,
    points: Sequence[tuple[str, str, float, float]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float],
) -> Figure:
    """Draw named points, such as runs by bits per weight and perplexity, where less is better.

    A line joins the points that no other one beats in both.

    Args:
        title: of the figure.
        points: name, group (which has a colour and a place in the legend), x and y of each.
        x_label: name and unit of x.
        y_label: name and unit of y.
        levels: name and y of horizontal lines, such as dense models.
    """
    groups = list(dict.fromkeys(group for _, group, _, _ in points))
    num_rows = -(-(len(groups) + len(levels) + 1) // 2)
    height = 3.6 + 0.2 * num_rows
    figure = new_figure(6.2, height)
    axes = plain_axes(figure, title, x_label, y_label)
    figure.subplots_adjust(left=0.11, right=0.97, top=1 - 0.32 / height, bottom=(0.5 + 0.2 * num_rows) / height)
    for number, group in enumerate(groups):
        mine = [(x, y) for _, its, x, y in points if its == group]
        axes.scatter(*zip(*mine, strict=True), s=34, color=colormaps["tab10"](number % 10), label=group, zorder=3)
    front = pareto_front([(x, y) for _, _, x, y in points])
    if len(front) > 1:
        axes.plot(
            *zip(*front, strict=True), color="black", linewidth=1, alpha=0.6, label="best at their size", zorder=2
        )
    for number, (name, y) in enumerate(levels.items()):
        axes.axhline(y, color=colormaps["tab10"](7), linewidth=1.1, ls=("--", ":", "-.")[number % 3], label=name)
    values = [y for *_, y in points] + list(levels.values())
    if min(values, default=1) > 0 and max(values, default=1) > _WIDE * min(values, default=1):
        axes.set_yscale("log")
        for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_part(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.12, y=0.12)
    place_labels(axes, [(name, x, y) for name, _, x, y in points])
    figure.legend(fontsize=8, loc="lower center", ncols=2, frameon=False)
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in one coordinate without losing in the other, from left to right.

    Example:
        >>> pareto_front([(1, 5), (2, 3), (2, 4), (3, 3)])
        [(1, 5), (2, 3)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front
