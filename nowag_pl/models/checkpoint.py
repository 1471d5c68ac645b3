"""Save and load compressed models: a Hugging Face folder whose linears are stored compressed.

Beside config.json, tokenizer and generation settings lie safetensors files, with the tensors of compressed linears in
their stored types, and nowag_pl.json, which says what each compressed linear is.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nowag_pl.files import write_json, write_tensors
from nowag_pl.models.assembly import empty_like_described, fill, parameter_dtype
from nowag_pl.models.loading import DESCRIPTION_FILE, FORMAT, Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "model.safetensors"


def is_compressed(folder: Path) -> bool:
    """Tell whether a folder was written by :func:`save_compressed`."""
    return (folder / DESCRIPTION_FILE).is_file()


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module, that of compressed linears in the types in which it is stored."""
    state = dict(module.state_dict())
    for name, linear in compressed_linears(module).items():
        state |= {f"{name}.{key}": tensor for key, tensor in linear.storage().items()}
    return state


def compressed_linears(module: nn.Module) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a module by name."""
    return {name: linear for name, linear in module.named_modules() if isinstance(linear, CompressedLinear)}


def save_compressed(model: "PreTrainedModel", folder: str | Path, source: str | None = None) -> None:
    """Write a compressed model.

    Args:
        model: a transformers model, any of whose linears are compressed.
        folder: folder to create or replace.
        source: model whose tokenizer and generation settings go along: "embedded", a folder or a hub id.

    Raises:
        OSError: the folder cannot be written.
    """
    tensors = stored_state(model)
    if model.config.tie_word_embeddings:
        tensors = _without_aliases(tensors)
    write_tensors(Path(folder) / WEIGHTS_FILE, tensors)
    descriptions = {name: linear.description() for name, linear in compressed_linears(model).items()}
    _describe(model, Path(folder), {WEIGHTS_FILE}, descriptions, source)


def save_streamed(model: StreamedModel, load_block: Callable[[int], nn.Module], folder: str | Path) -> None:
    """Write a compressed model that is never in memory as a whole, one file for each block.

    Args:
        model: where everything but the blocks comes from, with tokenizer and generation settings.
        load_block: gives a compressed block.
        folder: folder to create or replace.

    Raises:
        OSError: the folder cannot be written.
    """
    folder, descriptions = Path(folder), {}

    def blocks() -> Iterator[dict[str, Tensor]]:
        for index in range(len(model)):
            block, name = load_block(index), model.block_name(index)
            for key, linear in compressed_linears(block).items():
                descriptions[f"{name}.{key}"] = linear.description()
            yield {f"{name}.{key}": tensor for key, tensor in stored_state(block).items()}

    total, weight_map, count = 0, {}, len(model) + 1
    skeleton = _without_aliases(model.skeleton.state_dict())
    for number, tensors in enumerate(chain([skeleton], blocks()), 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / name, tensors)
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / f"{WEIGHTS_FILE}.index.json", index)
    files = {*weight_map.values(), f"{WEIGHTS_FILE}.index.json"}
    _describe(model.skeleton, folder, files, descriptions, model.checkpoint.path)


def _describe(
    model: "PreTrainedModel", folder: Path, weights: Iterable[str], descriptions: dict[str, Any], source: str | None
) -> None:
    """Write all that lies beside the weights, and delete weights of another model."""
    for file in folder.glob("*.safetensors*"):
        if file.name not in weights:
            file.unlink()
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if source is not None:
        Checkpoint(source).tokenizer.save_pretrained(folder)
    write_json(folder / DESCRIPTION_FILE, {"format": FORMAT, "linears": descriptions})


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
    checkpoint = Checkpoint(str(folder))
    model = checkpoint.build(empty=True)
    empty_like_described(model, checkpoint.compressed_linears)
    compressed = tuple(f"{name}." for name in checkpoint.compressed_linears)
    tensors = checkpoint.read(list(checkpoint.weight_map))
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
