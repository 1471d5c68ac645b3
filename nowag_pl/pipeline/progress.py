"""Progress over blocks with the time left: a live bar on a terminal, plain lines elsewhere."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_log = logging.getLogger("nowag_pl")


@contextmanager
def block_progress(stage: str, num_blocks: int, show: bool) -> Iterator[Callable[..., None]]:
    """Show how far a stage is.

    Args:
        stage: what is done, such as "Calibrating".
        num_blocks: blocks to do.
        show: False on all ranks but one.

    Yields:
        A function to call after each block, with a few words about it; with them and 0 to call in between, which
        only a terminal shows.
    """
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        done = 0

        def report(note: str, advance: int = 1) -> None:
            nonlocal done
            done += advance
            if show and advance:
                _log.info("%s: block %d of %d %s", stage, done, num_blocks, note)

        yield report
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(stage, total=num_blocks, note="")
        yield lambda note, advance=1: progress.update(task, advance=advance, note=note)
