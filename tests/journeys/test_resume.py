"""A killed run goes on where it was, and ends with the same bytes."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import artefacts, finish, fit_arguments, start

from nowag_pl.files import read_tensors

pytest_plugins = ["tiny_fixtures"]

NUM_BLOCKS = 6
SETTINGS = [
    "--compression.compressor=nowag_pl.NoWagQuantizer",
    "--compression.compressor.subvector_dim=4",
    "--compression.compressor.codebook_size=200",
    "--compression.compressor.max_iters=60",
    "--compression.compressor.tolerance=0",
    "--calibration.num_sequences=24",
    "--calibration.batch_size=2",
    "--report.batch_size=1",
]


@pytest.fixture(scope="module")
def model(model_folder) -> Path:
    return model_folder(num_blocks=NUM_BLOCKS, hidden_size=64, intermediate_size=128)


@pytest.fixture
def uninterrupted(command_line, model, workplace, tmp_path):
    """Return the artefacts of a run that nothing disturbed."""

    def run(*more: str):
        assert command_line(fit_arguments(workplace, model, tmp_path / "whole", *SETTINGS, *more)).code == 0
        return artefacts(tmp_path / "whole")

    return run


def kill_when(process, ready: Callable[[], bool], log: Path) -> None:
    """Send SIGKILL to a process as soon as `ready`."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
    assert process.returncode == -signal.SIGKILL


POINTS = {
    "calibration": ("moments/block_001.safetensors", "dense"),
    "compression": ("compressed/block_000.safetensors", "dense"),
    "comparison": ("reference", "dense"),
    "propagated": ("compressed/block_002.safetensors", "propagated"),
    "corrected": ("compressed/block_002.safetensors", "corrected"),
}


@pytest.mark.parametrize(
    "point",
    [pytest.param(each, marks=[] if each == "compression" else pytest.mark.slow) for each in POINTS],
)
def test_killed_run_goes_on_to_the_same_bytes(point, command_line, uninterrupted, model, workplace, tmp_path):
    name, mode = POINTS[point]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = fit_arguments(workplace, model, run_dir, *SETTINGS, f"--calibration.mode={mode}")
    process = start(arguments, log)
    kill_when(process, (run_dir / name).exists, log)
    assert not (run_dir / "report.json").exists()
    finished = {file: file.stat().st_mtime_ns for file in run_dir.glob("*/block_*.safetensors")}
    for file in finished:
        read_tensors(file)  # whole, whatever the moment
    if mode == "dense":
        assert len(list(run_dir.glob("moments/*"))) >= 1

    assert command_line(arguments).code == 0
    assert artefacts(run_dir) == uninterrupted(f"--calibration.mode={mode}")
    assert (run_dir / "report.json").is_file()
    kept = {file: file.stat().st_mtime_ns for file in finished if "compressed" in str(file) or mode == "dense"}
    assert kept.items() <= finished.items()  # what was finished is not made again


@pytest.mark.slow
def test_run_killed_at_random_moments_again_and_again(command_line, uninterrupted, model, workplace, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = fit_arguments(workplace, model, run_dir, *SETTINGS)
    moments = random.Random(0)
    for _ in range(6):
        process = start(arguments, log)
        delay = moments.uniform(0, 1.5)
        manifest = run_dir / "manifest.json"
        before = manifest.stat().st_mtime_ns if manifest.exists() else None
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if manifest.exists() and manifest.stat().st_mtime_ns != before:  # the stages begin
                time.sleep(delay)
                break
            time.sleep(0.001)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    process = start(arguments, log)
    finish(process, log)
    assert artefacts(run_dir) == uninterrupted()
