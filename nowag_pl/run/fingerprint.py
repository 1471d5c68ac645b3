"""What tells one model from another, and whether all of it is finite: every weight file is read once, and remembered.

What was found of large files is kept in the user's cache under path, size, time of writing and inode.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nowag_pl.digests import file_key
from nowag_pl.files import read_sealed_json, write_sealed_json
from nowag_pl.functional.chunks import row_chunks
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.checksums import INDEX_FILE, file_digest

_log = logging.getLogger("nowag_pl")
_WORTH_CACHING = 2**26  # bytes; smaller files are read in less than a tenth of a second
_LONG = 2**34
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a hash of the configuration and of every weight file.

    The checksums are those of the index, where it has them, with which files are compared when they are read.
    """
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    recorded = _recorded(checkpoint.folder / INDEX_FILE)
    for file in _weight_files(checkpoint):
        found = recorded.get(file.name) or _remembered(file, "sha256", file_digest)
        digest.update(f"{file.name} {found}".encode())
    return digest.hexdigest()


def check_finite(checkpoint: Checkpoint) -> None:
    """Raise ValueError that names the first tensor of a model that holds NaN or infinity: of linears, norms and all.

    Raises:
        ValueError: there is one.
    """
    for file in _weight_files(checkpoint):
        name = _remembered(file, "not_finite", _first_not_finite)
        if name:
            raise ValueError(f"{name.removesuffix('.weight')}: Expected finite weights, but got NaN or infinity.")


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted(set(checkpoint.weight_map.values()))


def _first_not_finite(file: Path) -> str:
    """Return the name of the first tensor that is not finite, or an empty one."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            if not _is_finite(opened, name):
                return name
    return ""


def _is_finite(opened: Any, name: str) -> bool:
    """Tell whether a tensor of an open file is finite, a few rows in memory at a time."""
    stored = opened.get_slice(name)
    shape = stored.get_shape()
    if len(shape) < 2:
        tensor = opened.get_tensor(name)
        return tensor.dtype not in _FLOATS or bool(tensor.isfinite().all())
    parts = (stored[rows] for rows in row_chunks(shape[0], prod(shape[1:])))
    return all(part.dtype not in _FLOATS or bool(part.isfinite().all()) for part in parts)


def _remembered(file: Path, question: str, find: Callable[[Path], str]) -> str:
    """Return what is known of a file, finding it out where it is new or has changed."""
    key = file_key(file)
    if key[1] < _WORTH_CACHING:
        return find(file)
    record = _cache() / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json"
    known: dict[str, Any] = {}
    with suppress(ValueError, KeyError):
        content = read_sealed_json(record)["known"]
        known = content if isinstance(content, dict) else {}
    if not isinstance(known.get(question), str):
        if key[1] >= _LONG:
            _log.info("Reading %s once, to know it again", file)
        known[question] = find(file)
        # A cache that cannot be written only costs time.
        with suppress(OSError):
            write_sealed_json(record, {"known": known})
    return known[question]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nowag_pl" / "files"


def _recorded(index: Path) -> dict[str, str]:
    """Return the checksums of an index; none where there is no index, or one without checksums."""
    with suppress(OSError, json.JSONDecodeError, KeyError, TypeError):
        return dict(json.loads(index.read_text(encoding="utf-8"))["metadata"]["sha256"])
    return {}
