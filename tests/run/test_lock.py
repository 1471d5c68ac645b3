"""One writer for a run directory, in this process and among others."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nowag_pl.run import lock
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore

HOLDER = """
import sys, time
from pathlib import Path
from nowag_pl.run.lock import acquire
acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that writes in tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(30)
    process.stdout.close()


def test_second_writer_is_refused_with_host_and_process_of_the_first(holder, tmp_path):
    store = ArtefactStore(tmp_path / "run", Ranks())
    with pytest.raises(ValueError, match=rf"process {holder.pid} on \S+ does .*another run_dir"):
        store.claim("s", {"a": 1})
    assert not (tmp_path / "run" / "manifest.json").exists()
    # Looking needs no lock.
    store.check([])
    assert store.missing("moments", 2) == [0, 1]


def test_lock_dies_with_its_process(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            lock.acquire(tmp_path / "run")
            break
        except ValueError:
            time.sleep(0.05)
    lock.release(tmp_path / "run")


def test_a_writer_may_ask_again_and_lets_go(tmp_path):
    with lock.writing(tmp_path):
        lock.acquire(tmp_path)
        with lock.writing(tmp_path / "." / "x" / ".."):
            pass
        assert str(tmp_path.resolve()) in lock._held
    assert str(tmp_path.resolve()) not in lock._held


def test_only_temporary_files_of_ours_in_folders_of_ours_are_deleted(tmp_path):
    ours = f".block_000.safetensors.{'0' * 32}.nowag_pl.tmp"
    written = {"moments", "training", "finetuned/checkpoints/block_001", "export", "export_finetuned"}
    theirs = written | {"notes"}
    for folder in theirs:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / ours).touch()
        (tmp_path / folder / ".theirs.tmp").touch()
        (tmp_path / folder / ".theirs.nowag_pl.tmp").touch()
    with lock.writing(tmp_path):
        pass
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.tmp")}
    assert left == {f"{f}/.theirs.tmp" for f in theirs} | {f"{f}/.theirs.nowag_pl.tmp" for f in theirs} | {
        f"notes/{ours}"
    }
