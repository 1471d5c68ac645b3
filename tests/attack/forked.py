"""Commands of `main.py` in forked children of a process that has imported everything already: a start costs nothing.

A child is a process of its own with its own output, environment and signals, and ends as the interpreter would.
"""

import atexit
import contextlib
import gc
import math
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Before libraries read them.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "200",
    "TOKENIZERS_PARALLELISM": "false",
}


class Child:
    """A function in a process of its own.

    Args:
        run: the function.
        log: file of everything that it says.
        folder: where it runs; the log's folder by default.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        run: Callable[[], object],
        log: Path,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _live(run, log, folder or log.parent, environment or {})

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None if it still runs after a time."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self._code

    def seconds(self) -> float:
        """Return the processor seconds that it has used, or infinity once it has ended."""
        try:
            nanoseconds = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])
        except (OSError, IndexError):
            return math.inf
        return nanoseconds / 1e9

    def send(self, number: int) -> None:
        """Send a signal to it, if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Leave nothing running of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(60)

    def said(self) -> str:
        """Return its output."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def command(arguments: Sequence[str]) -> Callable[[], object]:
    """Return `python main.py` with arguments, to be run in a child."""

    def run() -> None:
        sys.argv = [str(ROOT / "main.py"), *arguments]
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")

    return run


def finished(
    run: Callable[[], object], log: Path, folder: Path | None = None, seconds: float = 600
) -> tuple[int | None, str]:
    """Run a function in a child to its end; return the exit code, None where it took too long, and what it said."""
    child = Child(run, log, folder)
    try:
        return child.wait(seconds), child.said()
    finally:
        child.end()


def ending_of(code: int | None, said: str) -> str:
    """Say in a word how a command ended that nobody stopped: "ok", "refused", "hang" or "traceback"."""
    if code is None:
        return "hang"
    if "Traceback (most recent call last)" in said or code < 0:
        return "traceback"
    return "refused" if code else "ok"


def preload(arguments: Sequence[str], log: Path) -> None:
    """Run a command in this process, so that its children have imported and made ready whatever it needs.

    Args:
        arguments: of the command.
        log: file of what it says.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    kept = [os.dup(number) for number in (1, 2)]
    try:
        _say_in(log)
        command(arguments)()
    finally:
        for number, descriptor in zip((1, 2), kept, strict=True):
            os.dup2(descriptor, number)
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)
    from nowag_pl import digests

    # A process of its own checks every file.
    digests._intact.clear()
    # A collection in a child would otherwise touch, and so copy, every page of these objects.
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@contextlib.contextmanager
def workplaces(*parents: str | None) -> Iterator[list[Path]]:
    """Yield a new folder in each of some folders; unlike `TemporaryDirectory`, a child that ends leaves them alone."""
    folders = [Path(tempfile.mkdtemp(dir=parent)) for parent in parents]
    try:
        yield folders
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _say_in(log: Path) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(output, number)


def _live(run: Callable[[], object], log: Path, folder: Path, environment: Mapping[str, str]) -> None:
    """Be the child: run the function and end as an interpreter that ran nothing else."""
    code = 1
    try:
        os.setsid()
        # As in an interpreter that has only begun, and main.py's first line.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(environment)
        os.chdir(folder)
        _say_in(log)
        code = _code_of(run)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _code_of(run: Callable[[], object]) -> int:
    try:
        run()
    except SystemExit as exit_:
        if isinstance(exit_.code, str):
            sys.stderr.write(f"{exit_.code}\n")
            return 1
        return exit_.code or 0
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
