"""Whether needs fit a machine, and what is said where they do not."""

import re
from dataclasses import replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from nowag_pl.needs import StageNeeds
from nowag_pl.reports import needs_table
from nowag_pl.reports.needs_table import LIBRARY_BYTES, Available, host_bytes, shortages, table

FITS = Available(device=100, host=100, disk=100)
STAGE = StageNeeds("one", 60, 30, 20, 50, "fewer.on_device", "fewer.in_host", "fewer.on_disk")


@pytest.fixture
def nothing_for_libraries(monkeypatch):
    monkeypatch.setattr(needs_table, "LIBRARY_BYTES", 0)


@pytest.mark.parametrize(
    ("available", "processes", "stage", "option"),
    [
        (replace(FITS, device=59), 1, "one may need .* of device memory", "change fewer.on_device$"),
        (replace(FITS, host=49), 1, "one may need .* of host memory", "change fewer.in_host$"),
        (FITS, 3, "one may need .* of host memory", "change fewer.in_host$"),
        (Available(None, 109, 100), 1, "one may need .* of host memory", "fewer.in_host or fewer.on_device$"),
        (replace(FITS, disk=49), 1, "the run may need .* of disk", "change fewer.on_disk, run_dir on another disk$"),
    ],
)
def test_what_does_not_fit_is_named_with_an_option(nothing_for_libraries, available, processes, stage, option):
    (sentence,) = shortages([STAGE], available, processes)
    assert re.match(stage, sentence)
    assert re.search(option, sentence)


def test_disk_of_all_stages_adds_up_less_what_is_there(nothing_for_libraries):
    assert shortages([STAGE, STAGE], FITS) == []
    assert len(shortages([STAGE, STAGE, STAGE], FITS)) == 1
    assert shortages([STAGE, STAGE, STAGE], FITS, on_disk=50) == []


def test_device_is_part_of_the_host_on_a_cpu():
    own = 2 * LIBRARY_BYTES
    assert host_bytes(STAGE, FITS, 2) == 80 + own
    assert host_bytes(STAGE, Available(None, 0, 0), 2) == 200 + own
    assert host_bytes(replace(STAGE, built=70), FITS, 2) == 220 + own


def test_folder_need_not_exist(tmp_path):
    available = Available.here(tmp_path / "not" / "there", torch.device("cpu"))
    assert available.device is None
    assert min(available.host, available.disk) > 0


@pytest.mark.parametrize("device", [2 * 2**30, None])
def test_table_shows_stages_and_what_is_available(device):
    console = Console(width=120, record=True, file=StringIO())
    stage = StageNeeds("calibration", 2**30, disk=3 * 2**30)
    console.print(table([stage], Available(device, 5 * 2**30, 7 * 2**30), 1))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "calibration" in line)
    assert ("1.00 GiB" in row) == (device is not None)
    assert ("1.12 GiB" in row) == (device is None)
    assert "3.00 GiB" in row
    last = next(line for line in lines if "available" in line)
    assert ("2.00 GiB" if device else "(is host memory)") in last
