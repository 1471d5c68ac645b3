"""The safetensors files of a model folder, and what their headers say; no pickle is ever opened."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from nowag_pl.files import read_json
from nowag_pl.models.format.checksums import INDEX_FILE, SINGLE_FILE

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TYPES = _FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for a type that models do not have, such as an 8-bit float


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a model folder: the one, those that the index names, or all that are there.

    Raises:
        ValueError: there are none, or the index is damaged.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    files = [folder / name for name in indexed_files(index)] if index.is_file() else []
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickle files ({', '.join(pickles[:3])})" if pickles else "none"
        raise ValueError(
            f"Expected safetensors weights in {folder}, but got {found}. Convert them once with "
            "transformers' save_pretrained; pickles are never opened here."
        )
    return files


def indexed_files(index: Path) -> list[str]:
    """Return the names of the weight files that an index holds.

    Raises:
        ValueError: it is damaged, or names something that is no weight file beside it.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"Expected a weight_map in {index}, but there is none: it is damaged, copy it again.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"Expected {index} to name safetensors files beside it, but got {name!r}.")
    return sorted(set(weight_map.values()))


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Return what files say of their tensors, by name.

    Raises:
        ValueError: a file is missing, cut short, damaged, or no plain file.
    """
    headers: dict[str, Header] = {}
    for file in files:
        try:
            if not file.is_file():
                raise FileNotFoundError("there is no plain file of this name")
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    headers[name] = Header(file, tuple(part.get_shape()), _TYPES.get(part.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"Expected {file} to be a whole safetensors file, but got: {error}. It is missing, damaged or cut "
                "short: download or copy it again."
            ) from error
    return headers


def floating_type(headers: Iterable[Header]) -> torch.dtype | None:
    """Return the type of the first tensor of floating type, as transformers does; None where there is none."""
    return next((header.dtype for header in headers if header.dtype in _FLOATS.values()), None)
