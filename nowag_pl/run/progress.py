"""Progress over blocks: a live bar on a terminal, plain lines elsewhere. Rank zero alone shows it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nowag_pl.run.wording import readable

_log = logging.getLogger("nowag_pl")


class Report(Protocol):
    """What a stage tells."""

    def __call__(self, note: str, advance: int = 1) -> None:
        """Say how far it is.

        Args:
            note: a few words, such as the linear that is worked on and the loss so far.
            advance: blocks that have been done since; with 0, only a terminal shows it.
        """


@contextmanager
def block_progress(stage: str, num_blocks: int, show: bool, device: torch.device) -> Iterator[Report]:
    """Show how far a stage is: block, time left, memory in use, and a few words.

    Args:
        stage: what is done, such as "Calibrating".
        num_blocks: blocks to do.
        show: False on all ranks but one.
        device: whose memory is shown.

    Yields:
        A function to call after each block, and in between.
    """
    console = Console(stderr=True)
    if not show:
        yield _silent
    elif console.is_terminal:
        with _live(console, stage, num_blocks, device) as report:
            yield report
    else:
        yield _lines(stage, num_blocks, device)


def memory_in_use(device: torch.device) -> str:
    """Return the memory of the device that is in use now, or that of the process where the CPU computes."""
    on_device = device.type == "cuda"
    size = torch.cuda.memory_allocated(device) if on_device else psutil.Process().memory_info().rss
    return readable(size)


def _silent(note: str, advance: int = 1) -> None:
    """Say nothing."""


def _lines(stage: str, num_blocks: int, device: torch.device) -> Report:
    """Return a report that writes a line for each block."""
    done, started = 0, time.monotonic()

    def report(note: str, advance: int = 1) -> None:
        nonlocal done
        done += advance
        if advance:
            left = (time.monotonic() - started) / done * (num_blocks - done)
            parts = (note, f"{_duration(left)} left" if done < num_blocks else "", memory_in_use(device))
            _log.info("%s: block %d of %d: %s", stage, done, num_blocks, ", ".join(filter(None, parts)))

    return report


@contextmanager
def _live(console: Console, stage: str, num_blocks: int, device: torch.device) -> Iterator[Report]:
    """Yield a report that moves a bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("block"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(stage, total=num_blocks, note="", memory=memory_in_use(device))

        def report(note: str, advance: int = 1) -> None:
            progress.update(task, advance=advance, note=note, memory=memory_in_use(device))

        yield report


def _duration(seconds: float) -> str:
    """Return hours, minutes and seconds, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
