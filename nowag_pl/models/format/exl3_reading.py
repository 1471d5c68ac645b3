"""Read the tensors of an EXL3 folder as those of the dense model that it stands for; a linear at a time is restored."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nowag_pl.functional.trellis.codes import Code, code_values
from nowag_pl.functional.trellis.quantize import TrellisWeight, reconstruct

METHOD = "exl3"  # quant_method of the quantization_config
_STATE_BITS = 16
_PARTS = ("trellis", "suh", "svh", "mul1", "mcg")


def dense_names(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the names of the dense model's tensors, each with a file that holds something of it.

    Args:
        files: name of every stored tensor to its file.

    Example:
        >>> from pathlib import Path
        >>> list(dense_names({"q.trellis": Path("a"), "q.suh": Path("a"), "q.bias": Path("a")}))
        ['q.weight', 'q.bias']
    """
    linears = [name.removesuffix(".trellis") for name in files if name.endswith(".trellis")]
    parts = {f"{name}.{part}" for name in linears for part in _PARTS}
    restored = {f"{name}.weight": files[f"{name}.trellis"] for name in linears}
    return restored | {name: file for name, file in files.items() if name not in parts}


def stored_names(name: str, files: Mapping[str, Path]) -> list[str]:
    """Return the names of the stored tensors from which one of the dense model's is made.

    Args:
        name: one of :func:`dense_names`.
        files: name of every stored tensor to its file.
    """
    linear = name.removesuffix(".weight")
    return [name] if name in files else [f"{linear}.{part}" for part in _PARTS if f"{linear}.{part}" in files]


def restored(name: str, stored: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the dense model.

    Args:
        name: its name.
        stored: tensors by the names that :func:`stored_names` gives.
        shape: its shape; what is stored may be padded.
        dtype: type of a weight that is restored.

    Raises:
        ValueError: scales are missing: the folder was written by an early version of another program.
    """
    if name in stored:
        # A bias may be padded.
        return stored[name][: shape[0]] if stored[name].dim() == 1 and shape else stored[name]
    linear = name.removesuffix(".weight")
    parts = {part: stored[f"{linear}.{part}"] for part in _PARTS if f"{linear}.{part}" in stored}
    if not parts.keys() >= {"trellis", "suh", "svh"}:
        raise ValueError(f"Expected trellis, suh and svh of {linear}, but got {', '.join(parts) or 'none'}.")
    code: Code = "mul1" if "mul1" in parts else "mcg" if "mcg" in parts else "3inst"
    packed = TrellisWeight(parts["trellis"], parts["suh"], parts["svh"], (shape[0], shape[1]))
    values = code_values(code, _STATE_BITS).to(parts["trellis"].device)
    return reconstruct(packed, values, parts["trellis"].shape[2] // 16, "both").to(dtype)
