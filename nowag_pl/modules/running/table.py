"""The table of what an accelerated model does."""

from collections.abc import Sequence
from io import StringIO
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 100


class Gain(NamedTuple):
    """What linears of one kind do, and how that compares with dense ones."""

    linear: str
    number: int
    form: str
    speeds: Sequence[float]  # as multiples of a dense linear's
    memory: float  # as a multiple of a dense linear's
    note: str  # why there is no other form, if there is a reason


def gains_table(gains: Sequence[Gain], tokens: Sequence[int], dtype: str) -> str:
    """Lay out the gains as text.

    Args:
        gains: one for each kind of linears.
        tokens: for how many tokens at a time the speeds were measured.
        dtype: type of the dense linears.

    Example:
        >>> gain = Gain("VQLinear 64 x 64", 7, "whole codes", [2.4, 1.01], 0.2, "")
        >>> print(gains_table([gain], [1, 128], "bfloat16").splitlines()[-1].strip())
        7   VQLinear 64 x 64   whole codes     2.40x        1.01x    0.20x
    """
    table = Table(title=f"Speed and memory beside dense {dtype} linears", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("linears", "kind", "run as"):
        table.add_column(column, justify="right" if column == "linears" else "left", no_wrap=True)
    for column in (*(f"{count} token{'s' if count > 1 else ''}" for count in tokens), "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    has_notes = any(gain.note for gain in gains)
    if has_notes:
        table.add_column("note", justify="left")
    for gain in gains:
        figures = [f"{value:.2f}x" for value in (*gain.speeds, gain.memory)]
        table.add_row(str(gain.number), gain.linear, gain.form, *figures, *([gain.note] if has_notes else []))
    text = StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
