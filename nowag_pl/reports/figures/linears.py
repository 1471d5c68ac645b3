"""Figures of a run: one linear before and after normalisation, and all linears by block."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from nowag_pl.reports.averages import mean_over_weights
from nowag_pl.reports.figures.matrices import Panel, color_limits, heat_map_figure, panel_figure
from nowag_pl.reports.views import LinearView

EXPERT = re.compile(r"\.experts\.\d+\.")
_ERROR_DECADES = 3
_MAPS = {"loss": ".3f", "sparsity": ".2f", "bits_per_weight": ".2f"}


def linear_drawing(view: LinearView) -> Figure:
    """Draw the matrices of one linear: the original above, normalised below, and the compressed ones to the right."""
    images = view.images
    low, high = color_limits(images["error"])
    # Weights that are exact would take most of the colours.
    scale = (max(low, high - _ERROR_DECADES), high)
    above: list[Panel | None] = [
        Panel("log10 of weight |W|", images["weight"]),
        Panel("log10 of importance h W²", images["importance"]),
    ]
    below: list[Panel | None] = [
        Panel("log10 of normalised |W̄|", images["normalized"]),
        Panel("log10 of importance h W̄²", images["normalized_importance"]),
        Panel("log10 of error h (W̄ - Ŵ)²", images["error"], limits=scale),
    ]
    if view.kept is not None and view.mask is not None:
        above.append(Panel("share of weights kept", view.kept, ".2f"))
        above.append(Panel(f"mask, first {view.mask.shape[0]} x {view.mask.shape[1]} (dark: kept)", view.mask))
    return panel_figure(f"block {view.block}, {view.name}", [above, below])


def linears_drawing(rows: Sequence[Mapping[str, Any]]) -> tuple[Figure | None, list[str]]:
    """Draw heat maps of loss, sparsity and bits, linears from top to bottom and blocks from left to right.

    The experts of a block are one, by the mean over their weights.

    Args:
        rows: "name" in the model, "shape", "loss", "sparsity" and "bits_per_weight" of every linear.

    Returns:
        The maps of what differs between linears, or None; and a clause for each figure that is the same everywhere.
    """
    places = by_kind(rows)
    blocks = sorted({block for block, _ in places})
    names = list(dict.fromkeys(name for _, name in places))
    maps, same = [], []
    for key, spec in _MAPS.items():
        title, means = key.replace("_", " "), {place: mean_over_weights(each, key) for place, each in places.items()}
        found = {row[key] for row in rows}
        if len(found) == 1:
            same.append(f"{title} {format(found.pop(), spec)}")
        else:
            values = [[means.get((block, name)) for block in blocks] for name in names]
            maps.append((title, values, spec))
    return heat_map_figure(maps, names) if maps else None, same


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], list[Mapping[str, Any]]]:
    """Return the rows of linears by number of the block and name in it, those of its experts together.

    Args:
        rows: "name" in the model of every linear.

    Example:
        >>> rows = [{"name": f"layers.3.mlp.experts.{number}.up_proj"} for number in range(2)]
        >>> {place: len(of_kind) for place, of_kind in by_kind(rows).items()}
        {(3, 'mlp.experts.*.up_proj'): 2}
    """
    kinds: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        block, name = split_name(row["name"])
        kinds.setdefault((block, EXPERT.sub(".experts.*.", name)), []).append(row)
    return kinds


def split_name(name: str) -> tuple[int, str]:
    """Return the number of the block, and the name in it, of a linear of the model.

    Example:
        >>> split_name("model.layers.3.mlp.up_proj")
        (3, 'mlp.up_proj')
    """
    match = re.fullmatch(r".*?\.(\d+)\.(.+)", name)
    assert match is not None, name
    return int(match[1]), match[2]
