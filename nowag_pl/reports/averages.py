"""Averages over the linears of a model, as :meth:`CompressionRun.statistics` and report.json list them."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any


def num_weights(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the weights of all linears together.

    Args:
        rows: "shape" `(out, in)` of every linear.
    """
    return sum(prod(row["shape"]) for row in rows)


def mean_over_weights(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the average of a figure, in which every linear counts by its weights.

    Args:
        rows: "shape" `(out, in)` and the figure of every linear; at least one.
        key: name of the figure, such as "loss".

    Example:
        >>> mean_over_weights([{"shape": (1, 3), "loss": 0.0}, {"shape": (1, 1), "loss": 1.0}], "loss")
        0.25
    """
    return sum(row[key] * prod(row["shape"]) for row in rows) / num_weights(rows)
