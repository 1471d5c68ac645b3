"""One writer for a run directory: a lock that the operating system takes back when its process ends."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nowag_pl.files import remove_temporary
from nowag_pl.run import provenance
from nowag_pl.run.layout import LOCK, written_folders

_log = logging.getLogger("nowag_pl")
# File systems that know no locks answer with one of these.
_UNKNOWN = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[str, int | None] = {}  # run directory to file descriptor; None where another process holds it for this one


def acquire(folder: Path) -> None:
    """Become the writer of a run directory, unless this process is; then delete what a killed writer was writing.

    Args:
        folder: run directory; it is created.

    Raises:
        ValueError: another process is; the message names its host and number.
        OSError: the folder cannot be written.
    """
    key = str(folder.resolve())
    if key in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _read(descriptor)
        os.close(descriptor)
        if error.errno in _UNKNOWN:
            _log.warning("%s knows no locks: let only one process write in it.", folder)
        elif not _is_of_launcher(holder):
            raise ValueError(_taken(folder, holder)) from error
        _held[key] = None
        return
    _held[key] = descriptor
    described = {"host": socket.gethostname(), "pid": os.getpid(), "command": provenance.command()}
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(described).encode(), 0)
    for each in written_folders(folder):
        remove_temporary(each)


def release(folder: Path) -> None:
    """Let others write in a run directory."""
    descriptor = _held.pop(str(folder.resolve()), None)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def writing(folder: Path | None) -> Iterator[None]:
    """Be the writer of a run directory while the context is open.

    Args:
        folder: run directory; None where nothing is written.

    Raises:
        ValueError: another process is its writer.
    """
    if folder is None or str(folder.resolve()) in _held:
        yield
        return
    acquire(folder)
    try:
        yield
    finally:
        release(folder)


def _is_of_launcher(holder: dict[str, Any]) -> bool:
    """Tell whether the holder has started this process as one of its ranks."""
    parent = multiprocessing.parent_process()
    return parent is not None and (holder.get("host"), holder.get("pid")) == (socket.gethostname(), parent.pid)


def _read(descriptor: int) -> dict[str, Any]:
    """Return what the holder says of itself; nothing where it has not yet."""
    try:
        content = json.loads(os.pread(descriptor, 2**16, 0))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _taken(folder: Path, holder: dict[str, Any]) -> str:
    pid, host = holder.get("pid", "unknown"), holder.get("host", "an unknown host")
    return (
        f"Expected to be the only one that writes in run directory {folder}, but process {pid} on {host} does "
        f"({holder.get('command', 'command unknown')}). Wait for it, stop it, or choose another run_dir."
    )
