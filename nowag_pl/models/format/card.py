"""The model card of an export: how to load it, how it was compressed, and how well it does, where that is known."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from nowag_pl.files import write_text
from nowag_pl.models.format.descriptions import empty_linears

CARD_FILE = "README.md"
SOURCE_CARD_FILE = "README.source.md"
# The YAML between two lines of dashes at the top of a card, which a hub reads.
_FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_UNSAID = {"class", "in_features", "out_features", "num_kept", "padded", "bias", "dtype"}
_PACKED = """```python
import nowag_pl, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("path/of/this/folder", dtype="auto")
```"""
_DENSE = """```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder", dtype="auto")
```"""


def model_card(linears: Mapping[str, Mapping[str, Any]], dense: bool, source_card: str | None) -> str:
    """Return the card of an export.

    Args:
        linears: descriptions of the compressed linears; none where nothing is compressed.
        dense: whether they are stored as ordinary ones.
        source_card: the card of the source, from which the hub's settings are taken.
    """
    front = _FRONT.match(source_card or "")
    parts = [front.group() if front else "---\nlibrary_name: transformers\n---\n", _DENSE if dense else _PACKED, ""]
    if linears:
        parts += ["# Compressed by nowag_pl", "", *_methods(linears), ""]
    if linears and not dense:
        parts += ["The weights are packed: where nowag_pl is not installed, loading them ends in an error.", ""]
    if linears and dense:
        parts += ["The linears are stored as ordinary ones; the bits are those of a packed export.", ""]
    if source_card is not None:
        parts += [f"The card of the model that this one comes from is [{SOURCE_CARD_FILE}]({SOURCE_CARD_FILE}).", ""]
    return "\n".join(parts)


def add_figures(folder: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    """Add what was measured to the card of an export.

    Args:
        folder: the export.
        figures: values by their names, by text; those that are not finite are left out.
    """
    columns = list(dict.fromkeys(key for values in figures.values() for key in values))
    rows = []
    for text, values in figures.items():
        cells = (f"{values[key]:.4g}" if isfinite(values.get(key, float("nan"))) else "" for key in columns)
        rows.append([text.replace("|", "\\|"), *cells])
    if rows:
        card = (folder / CARD_FILE).read_text(encoding="utf-8")
        write_text(folder / CARD_FILE, "\n".join([card, *_table(["text", *columns], rows), ""]))


def _methods(linears: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a table of the kinds of linears, with their bits."""
    kinds: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, linear in empty_linears(linears).items():
        settings = {key: value for key, value in linears[name].items() if key not in _UNSAID}
        words = ", ".join(f"{key} {json.dumps(value)}" for key, value in settings.items() if value is not None)
        weights = linear.in_features * linear.out_features
        kinds[f"{linears[name]['class']}|{words}"].append((weights, linear.bits_per_weight * weights))
    rows = [
        [*kind.split("|"), str(len(found)), f"{sum(bits for _, bits in found) / sum(w for w, _ in found):.3f}"]
        for kind, found in kinds.items()
    ]
    return _table(["method", "settings", "linears", "bits per weight"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
