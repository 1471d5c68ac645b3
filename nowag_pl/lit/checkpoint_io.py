"""The one place that writes and opens checkpoints of trainings: whole or absent, with a digest, never running code.

A checkpoint is written beside its place and renamed, so that a killed process or a full disk leaves the one before.
"""

import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from nowag_pl.digests import check_seal, file_digest, seal
from nowag_pl.files import read_sealed_json, replacing, set_aside, write_sealed_json

_log = logging.getLogger("nowag_pl")
_SHARDED = (".metadata", "meta.pt")  # files of a checkpoint that is a folder
_DIGESTS = "digests.json"  # of all its files, the last one that is written


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's way to its checkpoints: files on local file systems, read by torch's safe loader alone."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint with its digest, atomically.

        Raises:
            ValueError: the path is an address.
            OSError: it cannot be written.
        """
        place = local_path(path)
        if place.is_dir():
            shutil.rmtree(place)
        with replacing(place) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # its I/O errors do not derive from OSError
                _write_more(temporary)
                raise OSError(None, str(error).partition("\n")[0]) from error
            seal(temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint, whatever is asked for without running code.

        Raises:
            ValueError: it is not there, damaged, or holds more than tensors and plain values.
        """
        return read_checkpoint(path, map_location)


def _write_more(path: Path) -> None:
    """Let the operating system say why a file cannot grow; torch only says that it has not.

    Raises:
        OSError: it cannot.
    """
    with path.open("ab") as file:
        file.write(bytes(2**20))
        file.flush()
        os.fsync(file.fileno())


def local_path(path: str | Path, wanted: str = "a checkpoint") -> Path:
    """Return a path, unless it is an address, from which nothing is fetched.

    Args:
        path: a file or folder.
        wanted: for the message.

    Raises:
        ValueError: it is an address.
    """
    if "://" in str(path) or "::" in str(path):
        raise ValueError(f"Expected {wanted} on this machine, but got the address {path}: copy it here first.")
    return Path(path)


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint of a training.

    Args:
        path: a file.
        map_location: device to which its tensors go.
        mmap: read tensors when they are used.

    Raises:
        ValueError: it is not there, damaged, or holds more than tensors and plain values.
    """
    place = local_path(path)
    try:
        if not is_zipfile(place):
            raise ValueError("another file, one that is cut short, or none")
        check_seal(place, required=False)
        content = torch.load(place, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected {place} to be a checkpoint of tensors and plain values, but it is damaged, or holds something "
            "else, which could run code."
        ) from error
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(f"Expected {place} to be a whole checkpoint, but got: {problem}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected {place} to be a checkpoint of Lightning, but it holds a {type(content).__name__}.")
    return content


def is_sharded(path: Path) -> bool:
    """Tell whether a folder is a whole checkpoint of a sharded model."""
    return path.is_dir() and all((path / name).is_file() for name in _SHARDED)


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the digests of files in a folder by their name."""
    return {name: file_digest(folder / name) for name in names}


def seal_folder(folder: Path, digests: Mapping[str, str]) -> None:
    """Write the digests of all files of a sharded checkpoint into its folder."""
    write_sealed_json(folder / _DIGESTS, dict(digests))


def check_folder(folder: Path, required: bool = True) -> None:
    """Compare the files of a sharded checkpoint with their digests.

    Args:
        folder: the checkpoint.
        required: whether one without digests is refused; False for those of other programs.

    Raises:
        ValueError: a file is missing or damaged.
        OSError: a file cannot be read.
    """
    if not is_sharded(folder):
        raise ValueError("parts of it are not there")
    if not required and not (folder / _DIGESTS).exists():
        return
    digests = read_sealed_json(folder / _DIGESTS)
    found = {path.name for path in folder.iterdir()} - {_DIGESTS}
    if found != set(digests):
        raise ValueError(f"its files are not those that were written: {sorted(found ^ set(digests))[:3]}")
    for name, digest in digests.items():
        if file_digest(folder / name) != digest:
            raise ValueError(f"{name} does not have its digest")


def whole_checkpoint(path: Path) -> bool:
    """Tell whether a checkpoint that a run has written is whole; one that is damaged is set aside by name.

    Args:
        path: a file or, of a sharded model, a folder that is there.
    """
    try:
        if not path.is_dir():
            check_seal(path)
        else:
            check_folder(path)
    except (OSError, ValueError) as error:
        aside = set_aside(path)
        _log.warning("%s is damaged (%s): it is kept as %s, and training goes on without it.", path, error, aside.name)
        return False
    return True


def newest_whole(folder: Path, first: str) -> Path | None:
    """Return the checkpoint from which a training goes on, or None where there is none that is whole.

    Args:
        folder: checkpoints of the training.
        first: name of the one that is taken where it is whole; after it come the others, the newest first, those
            left out that hold the weights alone.
    """
    others = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in [folder / first, *(path for path in others if path.name != first)]:
        if path.exists() and whole_checkpoint(path) and (path.is_dir() or path.name == first or _can_go_on(path)):
            return path
    return None


def _can_go_on(path: Path) -> bool:
    """Tell whether a checkpoint holds the state of a training beside the weights."""
    return "loops" in read_checkpoint(path, mmap=True)
