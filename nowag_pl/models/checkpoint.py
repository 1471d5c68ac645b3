"""Save and load compressed models: a Hugging Face folder whose linears are stored compressed.

Beside config.json, tokenizer and generation settings lie model.safetensors, with the tensors of compressed linears in
their stored types, and nowag_pl.json, which says what each compressed linear is.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nowag_pl.files import read_json, read_tensors, write_json, write_tensors
from nowag_pl.models.assembly import empty_like_described, fill, parameter_dtype
from nowag_pl.models.loading import Checkpoint
from nowag_pl.modules import CompressedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
DESCRIPTION_FILE = "nowag_pl.json"
WEIGHTS_FILE = "model.safetensors"


def is_compressed(folder: Path) -> bool:
    """Tell whether a folder was written by :func:`save_compressed`."""
    return (folder / DESCRIPTION_FILE).is_file()


def save_compressed(model: "PreTrainedModel", folder: str | Path, source: str | None = None) -> None:
    """Write a compressed model.

    Args:
        model: a transformers model, any of whose linears are compressed.
        folder: folder to create or replace.
        source: model whose tokenizer and generation settings go along: "embedded", a folder or a hub id.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    compressed = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    tensors = dict(model.state_dict())
    for name, module in compressed.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in module.storage().items()}
    if model.config.tie_word_embeddings:
        tensors = _without_aliases(tensors)
    write_tensors(folder / WEIGHTS_FILE, tensors)
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if source is not None:
        Checkpoint(source).tokenizer.save_pretrained(folder)
    linears = {name: module.description() for name, module in compressed.items()}
    write_json(folder / DESCRIPTION_FILE, {"format": FORMAT, "linears": linears})


def load_compressed(folder: str | Path, dtype: torch.dtype | None = None) -> "PreTrainedModel":
    """Load what :func:`save_compressed` wrote.

    Args:
        folder: folder with a compressed model.
        dtype: type of everything that is not compressed. None: as stored.

    Returns:
        A transformers model with compressed linears, in evaluation mode.

    Raises:
        ValueError: the folder holds no compressed model, one of a newer format, or a damaged one.
    """
    folder = Path(folder)
    if not is_compressed(folder):
        raise ValueError(
            f"Expected {folder} to hold a compressed model ({DESCRIPTION_FILE}), but it does not. "
            "Load dense models with transformers."
        )
    description = read_json(folder / DESCRIPTION_FILE)
    if description["format"] > FORMAT:
        raise ValueError(
            f"Expected format {FORMAT} or older in {folder}, but got {description['format']}: update nowag_pl."
        )
    checkpoint = Checkpoint(str(folder))
    model = checkpoint.build(empty=True)
    empty_like_described(model, description["linears"])
    compressed = tuple(f"{name}." for name in description["linears"])
    tensors, _ = read_tensors(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            own = parameter_dtype(model, name) if name.startswith(compressed) else dtype
            tensors[name] = tensor.to(own or tensor.dtype)
    fill(model, tensors, required=compressed)
    return model.eval()


def _without_aliases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep one name, the first, of tensors that share their memory."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.data_ptr() or id(tensor), name)
    return {name: tensors[name] for name in first.values()}
