"""What is looked at before a model folder is opened, so that a damaged or hostile one ends in one line, at once."""

import stat
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch

_MOST_BLOCKS = 10_000
_LARGEST = 10_000_000
_LONGEST = 10**12  # nothing is made as long as a context
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    "hidden_size",
    "n_embd",
    "vocab_size",
    "head_dim",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
)
_MAY_BE_ZERO = ("intermediate_size",)
_TYPES = ("dtype", "torch_dtype")
_MAPPINGS = ("quantization_config", "rope_parameters", "rope_scaling")
_NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_BELOW = ("text_config", "vision_config")


def check_plain_files(folder: Path) -> None:
    """Check that nothing in a folder blocks whoever reads it.

    Raises:
        ValueError: it holds a pipe, a socket or a device.
    """
    for path in sorted(folder.iterdir()):
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise ValueError(f"Expected {folder} to hold plain files, but {path.name!r} is a pipe, socket or device.")


def check_sizes(content: Any, file: Path) -> None:
    """Check the sizes in a configuration before anything is built of them.

    Args:
        content: what config.json holds.
        file: for messages.

    Raises:
        ValueError: it is no configuration, or a size is no number or beyond every model.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected {file} to hold the configuration of a model, but got a {type(content).__name__}.")
    limits = dict.fromkeys(_BLOCK_COUNTS, _MOST_BLOCKS) | dict.fromkeys(_SIZES, _LARGEST)
    limits |= {"max_position_embeddings": _LONGEST}
    for key, limit in (limits | dict.fromkeys(_MAY_BE_ZERO, _LARGEST)).items():
        value, least = content.get(key), 0 if key in _MAY_BE_ZERO else 1
        for size in value if isinstance(value, list) else [value]:
            if size is not None and (type(size) is not int or not least <= size <= limit):
                raise ValueError(
                    f"Expected {key} in {file} to be a number in [{least}, {limit}], but got {_short(size)}."
                )
    _check_kinds(content, file)
    for key in _BELOW:
        if content.get(key) is not None:
            check_sizes(content[key], file)


def _check_kinds(content: Mapping[str, Any], file: Path) -> None:
    """Check the values of a configuration that transformers takes as they are, and stumbles over later."""
    for key in _TYPES:
        if (name := content.get(key)) is not None and not _is_type(name):
            raise ValueError(f"Expected {key} in {file} to be a type such as 'bfloat16', but got {_short(name)}.")
    for key in _MAPPINGS:
        if content.get(key) is not None and not isinstance(content[key], Mapping):
            raise ValueError(f"Expected {key} in {file} to be a mapping, but got {_short(content[key])}.")
    for place in (content, *(content.get(key) or {} for key in _MAPPINGS)):
        for key in _NUMBERS:
            if (number := place.get(key)) is not None and (isinstance(number, bool) or not isinstance(number, Real)):
                raise ValueError(f"Expected {key} in {file} to be a number, but got {_short(number)}.")
    pad, size = content.get("pad_token_id"), content.get("vocab_size")
    if isinstance(pad, int) and isinstance(size, int) and pad >= size:
        raise ValueError(f"Expected pad_token_id in {file} below vocab_size = {size}, but got {pad}.")
    if not isinstance(content.get("model_type", ""), str):
        raise ValueError(f"Expected model_type in {file} to be text, but got {_short(content['model_type'])}.")


def _is_type(name: object) -> bool:
    # Parts of a model may have types of their own.
    if isinstance(name, Mapping):
        return all(map(_is_type, name.values()))
    return isinstance(name, str) and (name == "auto" or isinstance(vars(torch).get(name), torch.dtype))


def key_holding(content: Any, word: object) -> str | None:
    """Return the key under which a configuration holds a value, such as "rope_parameters.rope_type"."""
    if not isinstance(content, Mapping):
        return None
    for key, value in content.items():
        if value == word:
            return str(key)
        if below := key_holding(value, word):
            return f"{key}.{below}"
    return None


def check_num_blocks(num_blocks: int | None, num_tensors: int, folder: Path) -> None:
    """Check that a model has no more blocks than tensors.

    Raises:
        ValueError: it has more.
    """
    if num_blocks is not None and num_blocks > num_tensors:
        raise ValueError(
            f"Expected num_hidden_layers in {folder}/config.json to be that of the weights, but got {num_blocks} "
            f"blocks and {num_tensors} tensors. The weights do not belong to this config.json."
        )


def _short(value: object) -> str:
    return repr(value)[:40]
