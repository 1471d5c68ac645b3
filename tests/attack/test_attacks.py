"""The attacks as tests: `python -m pytest -m slow tests/attack [--kills 500] [--signals 300] [--corruptions 200]`.

Each is a process of its own, whose table stays in the folder of the test and is shown where something was found.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ROOT, subprocess_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(20_000)]


def attacked(program: str, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Run an attack, and return its table."""
    output = folder / "table.json"
    command = [sys.executable, str(ROOT / "tests" / "attack" / program), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def test_wrong_uses_get_a_good_message_and_no_traceback(tmp_path):
    table = attacked("wrong_uses.py", tmp_path)
    assert [row for row in table if row["ended"] == "traceback"] == []
    poor = [row for row in table if not row["good"]]
    assert len(poor) <= 0.05 * len(table), json.dumps(poor, indent=1)


def test_no_damaged_file_is_used_silently(tmp_path, request):
    table = attacked("corruption.py", tmp_path, f"--number={request.config.getoption('--corruptions')}")
    assert [row for row in table if row["ended"] in ("used silently", "traceback", "hang")] == []


def test_stopped_runs_end_with_the_bytes_of_one_that_was_not(tmp_path, request):
    sizes = [f"--{name}={request.config.getoption(f'--{name}')}" for name in ("kills", "signals")]
    table = attacked("kills.py", tmp_path, *sizes)
    assert [row for row in table if row["problems"] or row["equal"] != row["finished"]] == []
