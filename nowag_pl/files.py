"""Files that are either whole or absent: temporary file, fsync, rename."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_METADATA_KEY = "nowag_pl"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    Args:
        path: the file to create or replace. Its folder is created.

    Raises:
        OSError: the folder cannot be written or the disk is full. `path` is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not write {path} ({error.strerror or error}). What was finished before is intact; "
            "free space or choose another folder, and run the same command again",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    flush(path.parent)


def flush(path: Path) -> None:
    """Make the content of a file survive a power cut, or the renames inside a folder, where the platform can."""
    if not path.is_dir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {path} to be a JSON file, but it is missing or damaged: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically.

    Args:
        path: the file to create or replace.
        tensors: name to tensor, on any device.
        metadata: JSON values; kept in the file's header, beside the "format" that other readers look for.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt"} | ({_METADATA_KEY: json.dumps(metadata)} if metadata else {})
    with replacing(path) as temporary:
        try:
            save_file(contiguous, temporary, header)
        except SafetensorError as error:  # its I/O errors do not derive from OSError
            raise OSError(None, str(error)) from error


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata of what :func:`write_tensors` wrote.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    with _opened(path, "cpu") as file:
        return _metadata(file)


@contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected {path} to be a whole safetensors file, but got: {error}. It is missing, damaged or cut short; "
            "delete it and run the same command again."
        ) from error


@contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a memory-mapped tensor to fill; `path` appears, as a NumPy file, when that has succeeded.

    Args:
        path: the file to create or replace.
        shape: its shape; an empty one is fine.
        dtype: its type. bfloat16, which NumPy lacks, is kept as its bits.
    """
    with replacing(path) as temporary:
        mapped = np.lib.format.open_memmap(temporary, "w+", _numpy_dtype(dtype), shape)
        yield torch.from_numpy(mapped).view(dtype)
        mapped.flush()


def read_array(path: Path, dtype: torch.dtype) -> Tensor:
    """Return what :func:`new_array` wrote, memory-mapped: parts are read when they are used.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        mapped = np.lib.format.open_memmap(path, "c")
        return torch.from_numpy(mapped).view(dtype)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"Expected {path} to be a whole array of {dtype}, but got: {error}. It is missing, damaged or cut short; "
            "delete it and run the same command again."
        ) from error


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype


def _metadata(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
