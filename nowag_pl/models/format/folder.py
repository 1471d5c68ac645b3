"""Write a model as a Hugging Face folder that is whole or is no model: config.json comes last."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nowag_pl.files import flush, write_json, write_tensors, write_text
from nowag_pl.models.checkpoint import CONFIG_FILE, DESCRIPTION_FILE, Checkpoint
from nowag_pl.models.format.card import CARD_FILE, SOURCE_CARD_FILE, model_card
from nowag_pl.models.format.checksums import INDEX_FILE, file_digest
from nowag_pl.models.format.source_files import write_source_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATION_FILE = "quantization_config.json"  # of other programs, beside config.json
_STAGE = ".incomplete"


class BlockwiseModel(Protocol):
    """A model whose blocks are given one after the other.

    Attributes:
        checkpoint: source of tokenizer and generation settings.
    """

    checkpoint: Checkpoint

    @property
    def skeleton(self) -> "PreTrainedModel":
        """All of the model but its blocks."""

    @property
    def has_experts(self) -> bool:
        """Whether a router sends the tokens of any block to experts."""

    def __len__(self) -> int:
        """Return the number of blocks."""

    def block_name(self, index: int) -> str:
        """Return the name of a block in the model."""


class FolderConfig(NamedTuple):
    """What configuration and model card of a folder say.

    Attributes:
        dtype: type that the configuration names.
        quantization: `quantization_config`, looked at when all shards are written; empty where nothing is compressed.
        dense: the weights are those of an ordinary model, which the configuration describes.
        quantization_file: name of a file that holds the `quantization_config`, too.
    """

    dtype: torch.dtype
    quantization: Mapping[str, Any] = {}
    dense: bool = False
    quantization_file: str | None = None


def write_folder(
    folder: Path,
    model: "PreTrainedModel",
    shards: Iterable[Mapping[str, Tensor]],
    source: str | None,
    config: FolderConfig,
) -> None:
    """Write weights, index with checksums, model card, configuration, and the source's other files.

    What `folder` held stays until everything is written beside it.

    Args:
        folder: folder to create, or whose model is replaced.
        model: a model with the right configuration; its weights are not looked at.
        shards: tensors by name for each file, made when it is written.
        source: model whose other files go along.
        config: what its configuration and its model card say.

    Raises:
        OSError: the folder cannot be written.
    """
    with _replacing_model(folder) as stage:
        weight_map = _write_shards(stage, shards)
        checkpoint = None if source is None else Checkpoint(source)
        write_source_files(stage, model, checkpoint, {} if config.dense else config.quantization, config.dtype)
        if config.quantization_file is not None:
            write_json(stage / config.quantization_file, dict(config.quantization))
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        metadata = {
            "total_size": sum(size for _, size in weight_map.values()),
            "sha256": {path.relative_to(stage).as_posix(): file_digest(path) for path in files},
        }
        index = {"metadata": metadata, "weight_map": {name: file for name, (file, _) in weight_map.items()}}
        write_json(stage / INDEX_FILE, index)
        # Without a checksum: whoever publishes a model writes into its card.
        linears = config.quantization.get("linears", {})
        write_text(stage / CARD_FILE, model_card(linears, config.dense, _source_card(stage)))


def _source_card(stage: Path) -> str | None:
    card = stage / SOURCE_CARD_FILE
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


def _write_shards(stage: Path, shards: Iterable[Mapping[str, Tensor]]) -> dict[str, tuple[str, int]]:
    """Write one file for each shard, and return file and bytes of every tensor."""
    contents: list[dict[str, int]] = []
    for tensors in shards:
        write_tensors(stage / f"{len(contents)}.safetensors", tensors)
        contents.append({name: tensor.nbytes for name, tensor in tensors.items()})
        del tensors  # before the next ones are made
    weight_map: dict[str, tuple[str, int]] = {}
    for number, sizes in enumerate(contents):
        file = f"model-{number + 1:05d}-of-{len(contents):05d}.safetensors"
        (stage / f"{number}.safetensors").rename(stage / file)
        weight_map |= {name: (file, size) for name, size in sizes.items()}
    return weight_map


@contextmanager
def _replacing_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside `folder`; on success its files replace the model there.

    A folder without config.json is no model to anyone: that file goes first and comes last.
    """
    stage = folder / _STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed
    try:
        stage.mkdir(parents=True)
        yield stage
        for path in stage.rglob("*"):
            flush(path)
        earlier = (folder / name for name in (CONFIG_FILE, DESCRIPTION_FILE, QUANTIZATION_FILE))
        for old in (*earlier, *folder.glob("*.safetensors*")):
            old.unlink(missing_ok=True)
        flush(folder)
        for new in sorted(stage.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            target = folder / new.name
            if target.is_dir():
                shutil.rmtree(target)
            if new.name == CONFIG_FILE:
                flush(folder)
            new.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    flush(folder)


def sharded(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Gather tensors into dicts of at most `max_bytes`, but for single tensors that are larger; at least one dict.

    Raises:
        ValueError: `max_bytes` is below 1.
    """
    if max_bytes < 1:
        raise ValueError(f"Expected max_shard_bytes of at least 1, but got {max_bytes}.")
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
