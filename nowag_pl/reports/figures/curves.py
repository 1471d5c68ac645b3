"""Curves and clouds of points: subvectors with codewords, values over blocks and epochs, perplexity against bits."""

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nowag_pl.reports.figures.canvas import new_figure

_POINTS, _CODEWORDS = "#7f9fc4", "#c0392b"


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
    first: int = 0,
    ordered: bool = False,
) -> Figure:
    """Draw values over whole numbers, one line for each name.

    Args:
        title: of the figure.
        lines: name to values.
        x_label: name of the counted things.
        y_label: name and unit of the values.
        first: number of the first value.
        ordered: the names have an order, such as blocks, and get colours that show it.
    """
    figure = new_figure(8.5, 3.4)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.98 if len(lines) == 1 else 0.8, top=0.9, bottom=0.15)
    axes.set_title(title, fontsize=10)
    colours = colormaps["viridis" if ordered else "tab10"]
    for number, (name, values) in enumerate(lines.items()):
        colour = colours(number / max(len(lines) - 1, 1)) if ordered else colours(number % 10)
        axes.plot(range(first, first + len(values)), values, marker=".", markersize=5, label=name, color=colour)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    if len(lines) > 1:
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.01, 0.5), ncols=1 + len(lines) // 17)
    return figure


def scatter_figure(
    title: str,
    points: Sequence[tuple[str, str, float, float]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, float],
) -> Figure:
    """Draw named points, such as runs by bits per weight and perplexity.

    Args:
        title: of the figure.
        points: name, group (which has a colour and a place in the legend), x and y of each.
        x_label: name and unit of x.
        y_label: name and unit of y.
        levels: name and y of horizontal lines, such as dense models.
    """
    figure = new_figure(9.0, 4.6)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.97, top=0.92, bottom=0.11)
    axes.set_title(title, fontsize=10)
    for number, group in enumerate(dict.fromkeys(group for _, group, _, _ in points)):
        mine = [(x, y) for _, its, x, y in points if its == group]
        axes.scatter(*zip(*mine, strict=True), s=28, color=colormaps["tab10"](number % 10), label=group, zorder=3)
    for name, _, x, y in points:
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=7)
    for number, (name, y) in enumerate(levels.items()):
        axes.axhline(y, color=colormaps["Greys"](0.9 - 0.5 * number / len(levels)), linewidth=0.9, ls="--", label=name)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.margins(x=0.15, y=0.12)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
    return figure
