"""Triton reads the environment when it is imported: its interpreter needs a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny_models import ROOT


def interpreted(script: str, cases: list) -> dict:
    """Return what a script beside this one, given the cases as JSON, prints for each as JSON."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).with_name(script)), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(cases, json.loads(done.stdout), strict=True))
