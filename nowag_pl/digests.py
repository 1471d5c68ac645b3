"""SHA-256 of what a run keeps: of tensors, in the header of safetensors files, and of whole files, at their end.

Every file is read for its digest once by a process, when it is first looked at.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_SEAL = b"nowag_pl sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_PIECE = 2**20
_intact: set[tuple[str, int, int, int]] = set()  # files whose digest this process has compared


class TensorsDigest:
    """The digest of named tensors, which are added one after the other in the order of their names.

    Args:
        metadata: text that belongs to them.
    """

    def __init__(self, metadata: str) -> None:
        self._digest = hashlib.sha256(metadata.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor in host memory: its name, type, shape and bytes."""
        self._digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        self._digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexadecimal(self) -> str:
        """Return the digest of what was added."""
        return self._digest.hexdigest()


def json_digest(content: Any) -> str:
    """Return the digest of JSON values, whatever the order of keys and the spaces between them."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the digest of a whole file."""
    with open(path, "rb") as file:
        return _digest_of(file, path.stat().st_size)


def once(path: Path, check: Callable[[], None]) -> None:
    """Check a file unless this process has done so and it has not changed since.

    Args:
        path: the file.
        check: raises where it is damaged.

    Raises:
        OSError: it is not there.
    """
    key = file_key(path)
    if key not in _intact:
        check()
        _intact.add(key)


def file_key(path: Path) -> tuple[str, int, int, int]:
    """Return what changes when a file is written: its real path, size, time of writing in nanoseconds, and inode."""
    real = path.resolve(strict=True)
    status = real.stat()
    return str(real), status.st_size, status.st_mtime_ns, status.st_ino


def seal(path: Path) -> None:
    """Put the digest of a file's content at its end, where NumPy and torch do not look."""
    with open(path, "rb+") as file:
        digest = _digest_of(file, path.stat().st_size)
        file.seek(0, os.SEEK_END)
        file.write(_SEAL + digest.encode())


def check_seal(path: Path, required: bool = True) -> None:
    """Compare a file with the digest at its end.

    Args:
        path: the file.
        required: whether a file without a digest is refused; False for those of other programs.

    Raises:
        ValueError: it is damaged or cut short.
        OSError: it cannot be read.
    """
    once(path, lambda: _check_seal(path, required))


def _check_seal(path: Path, required: bool) -> None:
    size = path.stat().st_size - _SEAL_BYTES
    with open(path, "rb") as file:
        file.seek(max(size, 0))
        end = file.read()
        file.seek(0)
        if not end.startswith(_SEAL):
            if required:
                raise ValueError("the digest at its end is not there")
        elif _digest_of(file, size) != end.removeprefix(_SEAL).decode("latin-1"):
            raise ValueError("its content does not have the digest at its end")


def _digest_of(file: IO[Any], size: int) -> str:
    """Return the digest of the first bytes of a file."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()
