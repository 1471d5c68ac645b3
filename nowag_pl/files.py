"""Files that are either whole or absent: temporary file, fsync, rename."""

import json
import math
import os
import re
import shutil
import sys
import time
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

from nowag_pl.digests import TensorsDigest, check_seal, json_digest, once, seal

_METADATA_KEY = "nowag_pl"
SHA256 = "sha256"
_DIGEST_KEY = "nowag_pl_sha256"
LATE = 60.0  # seconds after which a network file system has shown a file for certain
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.nowag_pl\.tmp")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it over `path`.

    Args:
        path: the file to create or replace. Its folder is created.

    Raises:
        OSError: the folder cannot be written or the disk is full. `path` is then what it was before.
    """
    temporary = temporary_name(path)
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


def temporary_name(path: Path) -> Path:
    """Return a name beside a file or folder for what is to take its place; :func:`remove_temporary` knows it."""
    return path.with_name(f".{path.name}.{uuid4().hex}.nowag_pl.tmp")


def remove_temporary(folder: Path) -> None:
    """Delete the temporary files and folders that this package has left in one; other people's hidden files stay.

    Args:
        folder: a folder in which no other process writes; subfolders are not looked at.
    """
    for path in folder.glob(".*.nowag_pl.tmp"):
        if not _TEMPORARY.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to its name and ".damaged", and return that."""
    aside = path.with_name(f"{path.name}.damaged")
    if aside.is_dir():
        aside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.damaged")
    os.replace(path, aside)
    return aside


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


def await_file(path: Path, seconds: float = LATE) -> None:
    """Wait for a file that another machine has renamed into its place; a network file system may show it late.

    Args:
        path: the file; where it does not come, whoever reads it says so.
        seconds: for which to wait.
    """
    end = time.monotonic() + seconds
    while not path.is_file() and time.monotonic() < end:
        with suppress(OSError):
            # Looking at the folder makes such a system ask again.
            os.listdir(path.parent)
        time.sleep(0.05)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know; the message says where.
    """
    if (found := _not_finite(content)) is not None:
        raise ValueError(f"Expected finite numbers in {path}, but got {found}.")
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_sealed_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest under the key "sha256", atomically.

    Raises:
        ValueError: as :func:`write_json`.
    """
    plain = {key: value for key, value in json.loads(json.dumps(content)).items() if key != SHA256}
    write_json(path, plain | {SHA256: json_digest(plain)})


def read_sealed_json(path: Path, required: bool = True) -> dict[str, Any]:
    """Read what :func:`write_sealed_json` wrote, without the digest.

    Args:
        path: the file.
        required: whether one without a digest is refused; False for those of earlier versions.

    Raises:
        ValueError: it is missing or damaged.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"Expected {path} to hold a JSON object, but got a {type(content).__name__}.")
    digest = content.pop(SHA256, None)
    if (digest is None and required) or (digest is not None and digest != json_digest(content)):
        raise ValueError(f"Expected {path} as it was written, but its content does not have the digest in it.")
    return content


def _not_finite(content: Any, name: str = "") -> str | None:
    """Return the first number that is NaN or infinite with its place, such as "nan for perplexity.wiki"."""
    if isinstance(content, float):
        return None if math.isfinite(content) else f"{content} for {name.removeprefix('.')}"
    items: Any = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    return next((found for key, value in items if (found := _not_finite(value, f"{name}.{key}"))), None)


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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected {path} to be a JSON file, but it is missing or damaged: {error}.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write named tensors as one safetensors file, atomically.

    Args:
        path: the file to create or replace.
        tensors: name to tensor, on any device.
        metadata: JSON values; kept in the file's header, beside the digest of everything and the "format" that other
            readers look for.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata) if metadata else ""
    digest = TensorsDigest(text)
    for name in sorted(contiguous):
        digest.add(name, contiguous[name])
    header = {"format": "pt", _DIGEST_KEY: digest.hexadecimal()} | ({_METADATA_KEY: text} if text else {})
    with replacing(path) as temporary:
        _save_file(contiguous, temporary, header)
        _sort_metadata(temporary)


def _save_file(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file through a folder of ours.

    Its writer puts a file with a name of its own beside the one that it is given; a killed process leaves that there.
    """
    folder = temporary_name(path)
    folder.mkdir()
    try:
        save_file(tensors, folder / "tensors", header)
        os.replace(folder / "tensors", path)
    except SafetensorError as error:  # its I/O errors do not derive from OSError
        raise OSError(None, str(error)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in the order of its keys.

    Its writer takes them in a random order; this way equal content has equal bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        ValueError: the file is not as it was written.
    """
    check_tensors(path)
    with _opened(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118


def read_rows(path: Path, rows: Mapping[str, slice], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read some rows of tensors in a safetensors file, whose digest is not looked at.

    Args:
        path: the file.
        rows: name of each tensor to its rows; those of a number are all of it.
        device: where they go.

    Returns:
        Copies, so that nothing of the file stays in memory.

    Raises:
        ValueError: the file is damaged, or lacks one of them.
    """
    with _opened(path, device) as file:
        found = {}
        for name, wanted in rows.items():
            part = file.get_slice(name)
            found[name] = (part[wanted] if part.get_shape() else file.get_tensor(name)).clone()
        return found


def read_metadata(path: Path) -> dict[str, Any]:
    """Read only the metadata of what :func:`write_tensors` wrote.

    Raises:
        ValueError: the file is not as it was written.
    """
    check_tensors(path)
    with _opened(path, "cpu") as file:
        return _metadata(file)


def check_tensors(path: Path) -> None:
    """Compare what :func:`write_tensors` wrote with its digest, once for each process.

    Raises:
        ValueError: the file is missing, damaged or cut short.
    """
    with _refusing(path, "a whole safetensors file"):
        once(path, lambda: _check_tensors(path))


def _check_tensors(path: Path) -> None:
    with _opened(path, "cpu") as file:
        header = file.metadata() or {}
        digest = TensorsDigest(header.get(_METADATA_KEY, ""))
        for name in sorted(file.keys()):
            digest.add(name, file.get_tensor(name))
        if digest.hexadecimal() != header.get(_DIGEST_KEY):
            raise SafetensorError("its content does not have the digest in its header")


@contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[Any]:
    with _refusing(path, "a whole safetensors file"), safe_open(path, framework="pt", device=str(device)) as file:
        yield file


@contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    """Say of a file that cannot be read that it is damaged."""
    try:
        yield
    except (SafetensorError, OSError, EOFError, RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"Expected {path} to be {kind}, but got: {error}. It is missing, damaged or cut short; "
            "delete it and run the same command again."
        ) from error


@contextmanager
def new_array(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a memory-mapped tensor to fill; `path` appears, as a NumPy file, when that has succeeded.

    Args:
        path: the file to create or replace.
        shape: its shape; an empty one is fine.
        dtype: its type. bfloat16, which NumPy lacks, is kept as its bits.

    Raises:
        OSError: there is no space for it, which is told before anything is written.
    """
    with replacing(path) as temporary:
        mapped = np.lib.format.open_memmap(temporary, "w+", _numpy_dtype(dtype), shape)
        _reserve(temporary)
        yield torch.from_numpy(mapped).view(dtype)
        mapped.flush()
        seal(temporary)


def _reserve(path: Path) -> None:
    """Take the space of a file from the disk; writing to a mapped page without space would kill the process."""
    if sys.platform == "linux":
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def check_array(path: Path) -> None:
    """Compare what :func:`new_array` wrote with the digest at its end, once for each process.

    Raises:
        ValueError: the file is missing, damaged or cut short.
    """
    try:
        check_seal(path)
    except (OSError, ValueError) as error:
        raise _no_array(path, error) from error


def _no_array(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Expected {path} to be a whole array, but got: {error}. It is missing, damaged or cut short; "
        "delete it and run the same command again."
    )


def read_array(path: Path, dtype: torch.dtype) -> Tensor:
    """Return what :func:`new_array` wrote, memory-mapped: parts are read when they are used.

    Raises:
        ValueError: the file is missing or damaged.
    """
    check_array(path)
    try:
        mapped = np.lib.format.open_memmap(path, "c")
        return torch.from_numpy(mapped).view(dtype)
    except (OSError, ValueError, EOFError, RuntimeError) as error:
        raise _no_array(path, error) from error


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=torch.int16 if dtype == torch.bfloat16 else dtype).numpy().dtype


def _metadata(file: Any) -> dict[str, Any]:
    return json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
