import io
import logging
import re

import pytest
import torch
from rich.console import Console

from nowag_pl.run import progress
from nowag_pl.run.progress import block_progress, memory_in_use

CPU = torch.device("cpu")


def test_lines_say_block_note_time_left_and_memory(caplog, monkeypatch):
    clock = iter([0.0, 30.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "nowag_pl"), block_progress("Compressing", 2, True, CPU) as report:
        report("linear 1 of 7: q_proj", 0)
        report("mean loss 0.1")
        report("")
    first, last = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"Compressing: block 1 of 2: mean loss 0\.1, 0:00:30 left, [\d.,]+ [MG]iB", first)
    assert re.fullmatch(r"Compressing: block 2 of 2: [\d.,]+ [MG]iB", last)


def test_other_ranks_are_silent(caplog, capfd):
    with caplog.at_level(logging.INFO, "nowag_pl"), block_progress("Compressing", 2, False, CPU) as report:
        report("mean loss 0.1")
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_terminal_shows_one_bar_and_no_lines(caplog, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda stderr: console)
    with caplog.at_level(logging.INFO, "nowag_pl"), block_progress("Compressing", 3, True, CPU) as report:
        report("mean loss 0.1")
        report("linear 2 of 7: k_proj [0]", 0)
    last = screen.getvalue().rpartition("Compressing")[2]
    assert re.search(r"block 1/3 .* left .* [\d.,]+ [MG]iB +linear 2 of 7: k_proj \[0\]", last)
    assert not caplog.records


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00")]
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


def test_memory_is_that_of_this_process():
    import psutil

    number, unit = memory_in_use(CPU).split()
    shown = float(number.replace(",", "")) * {"MiB": 2**20, "GiB": 2**30}[unit]
    assert shown == pytest.approx(psutil.Process().memory_info().rss, abs=0.11 * 2**30)
