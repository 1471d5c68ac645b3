import io
import logging
import re

import pytest
import torch
from rich.console import Console

from nowag_pl.run import progress
from nowag_pl.run.progress import block_progress, memory_in_use

CPU = torch.device("cpu")


def test_lines_say_block_note_time_left_and_memory_at_most_every_30_seconds(caplog, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "nowag_pl"), block_progress("Compressing", 4, True, CPU) as report:
        for now, note, advance in [
            (5.0, "linear 1 of 7: q_proj", 0),
            (29.0, "mean loss 0.0", 1),
            (30.0, "mean loss 0.1", 1),
            (59.0, "mean loss 0.2", 1),
            (61.0, "linear 3 of 7: v_proj", 0),
            (62.0, "", 1),
        ]:
            clock[0] = now
            report(note, advance)
    first, within, last = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(r"Compressing: block 2 of 4: mean loss 0\.1, 0:00:30 left, [\d.,]+ [MG]iB", first)
    assert re.fullmatch(r"Compressing: block 3 of 4: linear 3 of 7: v_proj, 0:00:20 left, [\d.,]+ [MG]iB", within)
    assert re.fullmatch(r"Compressing: block 4 of 4: [\d.,]+ [MG]iB", last)


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
