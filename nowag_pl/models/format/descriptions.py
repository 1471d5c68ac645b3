"""What the configuration of a compressed model says of its linears, checked before any of them is read."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch

from nowag_pl.models.weights import Header
from nowag_pl.modules import CompressedLinear

FORMAT = 2  # of compressed models, see docs/format.md
METHOD = "nowag_pl"  # quant_method of the quantization_config


def described_linears(quantization: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the descriptions of the compressed linears by their name in the model.

    Args:
        quantization: `quantization_config` of a model; empty for a dense one.

    Raises:
        ValueError: it is of a newer format, of another program, or damaged.
    """
    if not quantization:
        return {}
    if quantization.get("quant_method") != METHOD:
        raise ValueError(
            f"Expected a dense model, or one that {METHOD} compressed, but got quant_method "
            f"{quantization.get('quant_method')!r}."
        )
    number: Any = quantization.get("format")
    linears: Any = quantization.get("linears")
    is_whole = type(number) is int and number >= 1 and isinstance(linears, dict)
    if not is_whole or not all(isinstance(each, dict) for each in linears.values()):
        raise ValueError(
            "Expected format and linears in quantization_config, but it is damaged: copy config.json again."
        )
    if number > FORMAT:
        raise ValueError(f"Expected a compressed model of format {FORMAT} or older, but got {number}: update {METHOD}.")
    return linears


def empty_linears(descriptions: Mapping[str, Mapping[str, object]]) -> dict[str, CompressedLinear]:
    """Make compressed linears of the given descriptions, on the meta device.

    Raises:
        ValueError: a description is damaged; the linear is named.
    """
    made: dict[str, CompressedLinear] = {}  # one of each kind is made, and copied
    linears = {}
    # transformers sets the model's type while it builds one; the linears know their own types.
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        for name, description in descriptions.items():
            kind = json.dumps(description)
            if kind not in made:
                with torch.device("meta"):
                    made[kind] = CompressedLinear.from_description(description)
            linears[name] = copy.deepcopy(made[kind])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        torch.set_default_dtype(default)
    return linears


def check_stored(linears: Mapping[str, CompressedLinear], headers: Mapping[str, Header]) -> None:
    """Check that files hold what linears need, in the right shapes and types, before it is read.

    Args:
        linears: empty linears by their name.
        headers: what the files say of their tensors.

    Raises:
        ValueError: a tensor is missing, or of another shape or type.
    """
    for name, linear in linears.items():
        for key, tensor in linear.state_dict().items():
            header = headers.get(f"{name}.{key}")
            if header is None:
                raise ValueError(f"Expected weights with {f'{name}.{key}'!r}, but it is missing: copy the model again.")
            dtype, is_float = header.dtype, header.dtype is not None and header.dtype.is_floating_point
            if header.shape != tensor.shape or not (is_float if tensor.is_floating_point() else dtype == tensor.dtype):
                raise ValueError(
                    f"Expected {f'{name}.{key}'!r} of shape {tuple(tensor.shape)} and type "
                    f"{'float' if tensor.is_floating_point() else tensor.dtype}, but {header.file.name} holds "
                    f"{header.shape} of {dtype}."
                )
