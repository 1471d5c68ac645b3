"""A further process of a run ends with the one that has started it; another process does not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import ROOT

BEGIN = "import os, subprocess, sys, time; from nowag_pl.run.orphans import end_with_starter; end_with_starter();"
CHILD = f"{BEGIN} time.sleep(30)"
STARTER = (
    f"{BEGIN} os.environ['LOCAL_RANK'] = sys.argv[1]; print(subprocess.Popen([sys.executable, '-c', {CHILD!r}]).pid)"
)


def is_there(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="reads /proc")
@pytest.mark.parametrize(("rank", "ends"), [("1", True), ("0", False)])
def test_a_further_process_ends_with_its_starter(rank, ends):
    environment = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"} | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, rank], stdout=subprocess.PIPE, env=environment, text=True
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        starter.wait(20)
    deadline = time.monotonic() + (10 if ends else 3)
    while is_there(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    there = is_there(pid)
    if there:
        os.kill(pid, 9)
    assert there != ends
