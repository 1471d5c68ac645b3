"""Save and load compressed models: a Hugging Face folder whose linears are stored compressed, or dense again.

docs/format.md describes the folder. Everything that it says of a linear comes from the linear's own class.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nowag_pl.files import read_json
from nowag_pl.models.assembly import empty_like_described, fill
from nowag_pl.models.checkpoint import CONFIG_FILE, DESCRIPTION_FILE, Checkpoint
from nowag_pl.models.experts import fused, fused_places
from nowag_pl.models.format.descriptions import FORMAT, METHOD
from nowag_pl.models.format.folder import BlockwiseModel, FolderConfig, sharded, write_folder
from nowag_pl.models.state import (
    check_linears,
    compressed_linears,
    dense_tensors,
    held_state,
    packed_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD_BYTES = 5 * 10**9


def is_compressed(folder: Path) -> bool:
    """Tell whether a folder was written by :func:`save_compressed`.

    Raises:
        ValueError: its config.json is damaged.
    """
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    quantization = (config.get("quantization_config") if isinstance(config, dict) else None) or {}
    return quantization.get("quant_method") == METHOD or (folder / DESCRIPTION_FILE).is_file()


def quantization(descriptions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the `quantization_config` of a model with the described linears."""
    return {"quant_method": METHOD, "format": FORMAT, "linears": descriptions}


def save_compressed(
    model: "PreTrainedModel", folder: str | Path, source: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a compressed model.

    Args:
        model: a transformers model, any of whose linears are compressed.
        folder: folder to create, or whose model is replaced.
        source: model whose tokenizer, licence and other files go along: "embedded", a folder or a hub id.
        max_shard_bytes: tensors in one file take no more, unless a single one is larger.

    Raises:
        ValueError: it is no model of transformers, or `max_shard_bytes` is below 1.
        OSError: the folder cannot be written. What it held before is then as it was.
    """
    _require_model(model)
    shards = sharded(packed_tensors(model), max_shard_bytes)
    write_folder(Path(folder), model, shards, source, FolderConfig(_dtype(model), _described(model)))


def save_dense(
    model: "PreTrainedModel", folder: str | Path, source: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a compressed model as an ordinary one, which every program that reads Hugging Face folders takes.

    Removed weights are exact zeros, quantized ones are reconstructed; it is as large as the dense model was.

    Args:
        model: as for :func:`save_compressed`; it stays as it is.
        folder: as for :func:`save_compressed`.
        source: as for :func:`save_compressed`.
        max_shard_bytes: as for :func:`save_compressed`; so much memory is needed beside the model.

    Raises:
        ValueError: it is no model of transformers, or `max_shard_bytes` is below 1.
        OSError: the folder cannot be written. What it held before is then as it was.
    """
    _require_model(model)
    shards = sharded(_as_ordinary(model, dense_tensors(model, _dtype(model)), source), max_shard_bytes)
    write_folder(Path(folder), model, shards, source, FolderConfig(_dtype(model), _described(model), dense=True))


def save_streamed(
    model: BlockwiseModel, load_block: Callable[[int], nn.Module], folder: str | Path, dense: bool = False
) -> None:
    """Write a compressed model that is never in memory as a whole, one file for each block.

    Args:
        model: where everything but the blocks comes from, with tokenizer and generation settings.
        load_block: gives a compressed block.
        folder: folder to create, or whose model is replaced.
        dense: write an ordinary model, as :func:`save_dense` does.

    Raises:
        OSError: the folder cannot be written. What it held before is then as it was.
    """
    described: dict[str, Any] = quantization({})
    dtype = model.checkpoint.dtype

    def tensors_of(index: int) -> dict[str, Tensor]:
        block, name = load_block(index), model.block_name(index)
        linears = compressed_linears(block).items()
        described["linears"] |= {f"{name}.{key}": linear.description() for key, linear in linears}
        tensors = dense_tensors(block, dtype) if dense else packed_tensors(block)
        return ordinary((f"{name}.{key}", tensor) for key, tensor in tensors)

    def ordinary(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        return dict(model.checkpoint.as_stored(tensors) if dense and model.has_experts else tensors)

    def shards() -> Iterator[dict[str, Tensor]]:
        linears = compressed_linears(model.skeleton).items()
        described["linears"] |= {name: linear.description() for name, linear in linears}
        yield ordinary(dense_tensors(model.skeleton, dtype) if dense else packed_tensors(model.skeleton))
        for index in range(len(model)):
            yield tensors_of(index)

    write_folder(Path(folder), model.skeleton, shards(), model.checkpoint.path, FolderConfig(dtype, described, dense))


def _as_ordinary(
    model: "PreTrainedModel", tensors: Iterable[tuple[str, Tensor]], source: str | None
) -> Iterable[tuple[str, Tensor]]:
    """Return the tensors of a dense model in a form that transformers opens: experts as the source stores them."""
    places = fused_places(model)
    if not places:
        return tensors
    return fused(tensors, places) if source is None else Checkpoint(source).as_stored(tensors)


def load_compressed(
    folder: str | Path, dtype: torch.dtype | None = None, verify: bool = True, packed: bool = False
) -> "PreTrainedModel":
    """Load what :func:`save_compressed` wrote.

    Args:
        folder: folder with a compressed model.
        dtype: type of everything that is not compressed. None: as stored.
        verify: compare every file with its checksum.
        packed: keep no dense weights in memory, which takes a fraction of it, and is slower. Otherwise weights are
            unpacked once, if there is memory; if not, the log says so.

    Returns:
        A transformers model with compressed linears, in evaluation mode.

    Raises:
        ValueError: the folder holds no compressed model, one of a newer format, or a damaged one.
    """
    if not isinstance(folder, str | Path):
        raise ValueError(f"Expected the folder of a compressed model, but got {folder!r}.")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"Expected dtype to be a floating type of torch or None, but got {dtype!r}.")
    checkpoint = Checkpoint(str(folder), verify=verify)
    if not is_compressed(checkpoint.folder):
        raise ValueError(
            f"Expected {folder} to hold a model that {METHOD} compressed, but it does not. Load dense models with "
            "transformers."
        )
    model = checkpoint.build(empty=True)
    empty_like_described(model, checkpoint.compressed_linears)
    compressed = tuple(f"{name}." for name in checkpoint.compressed_linears)
    tensors = checkpoint.read(list(checkpoint.weight_map))
    fill(model, held_state(model, tensors, dtype), dtype or checkpoint.dtype, required=compressed)
    check_linears(model)
    from nowag_pl.models.format.quantizer import attach  # which needs transformers

    attach(model, checkpoint.compressed_linears, packed)
    return model.eval()


def _require_model(model: object) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"Expected a model of transformers to save, but got {type(model).__name__}.")


def _described(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the `quantization_config` of a model in memory; empty where nothing is compressed."""
    descriptions = {name: linear.description() for name, linear in compressed_linears(model).items()}
    return quantization(descriptions) if descriptions else {}


def _dtype(model: "PreTrainedModel") -> torch.dtype:
    return cast(Tensor, model.get_input_embeddings().weight).dtype
