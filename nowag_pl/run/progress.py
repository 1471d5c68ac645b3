"""Progress of long stages: a live bar on a terminal, a line now and then elsewhere. Rank zero alone shows it."""

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
INTERVAL = 30.0  # seconds between two lines


class Report(Protocol):
    """What a stage tells."""

    def __call__(self, note: str, advance: int = 1) -> None:
        """Say how far it is.

        Args:
            note: a few words, such as the linear that is worked on and the loss so far.
            advance: blocks that have been done since.
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


def has_terminal() -> bool:
    """Tell whether bars can be shown."""
    return Console(stderr=True).is_terminal


def memory_in_use(device: torch.device) -> str:
    """Return the memory of the device that is in use now, or that of the process where the CPU computes."""
    on_device = device.type == "cuda"
    size = torch.cuda.memory_allocated(device) if on_device else psutil.Process().memory_info().rss
    return readable(size)


def _silent(note: str, advance: int = 1) -> None:
    """Say nothing."""


class Lines:
    """Lines of a long stage where there is no terminal: one at its end, and before that at most one in 30 seconds.

    Args:
        stage: what is done, such as "Calibrating".
        unit: what is counted, such as "block".
        total: how many there are.
        device: whose memory is shown.
        first: how many were done by an earlier process.
    """

    def __init__(self, stage: str, unit: str, total: int, device: torch.device, first: int = 0) -> None:
        self._stage, self._unit, self._total, self._device, self._first = stage, unit, total, device, first
        self._started = self._said = time.monotonic()

    @property
    def _memory(self) -> str:
        return memory_in_use(self._device)

    def is_due(self, done: int) -> bool:
        """Tell whether a line should be written after so many."""
        return self.is_over(done) or time.monotonic() - self._said >= INTERVAL

    def is_over(self, done: int) -> bool:
        """Tell whether all are done."""
        return done >= self._total

    def say(self, done: int, note: str) -> None:
        """Write a line.

        Args:
            done: how many are done.
            note: a few words.
        """
        self._said = now = time.monotonic()
        here = done - self._first
        left = (now - self._started) / here * (self._total - done) if here > 0 else 0.0
        parts = (note, f"{_duration(left)} left" if here > 0 and not self.is_over(done) else "", self._memory)
        words = ", ".join(filter(None, parts))
        _log.info("%s: %s %d of %d: %s", self._stage, self._unit, done, self._total, words)


def _lines(stage: str, num_blocks: int, device: torch.device) -> Report:
    """Return a report that writes lines, also in the middle of a block that takes long."""
    done, lines = 0, Lines(stage, "block", num_blocks, device)

    def report(note: str, advance: int = 1) -> None:
        nonlocal done
        done += advance
        if lines.is_due(done if advance else 0):
            lines.say(done, note)

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
