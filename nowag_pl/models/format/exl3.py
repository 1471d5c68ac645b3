"""Write models on a trellis as EXL3 folders, which exllamav3, TabbyAPI and GPTQModel read.

Of a linear there are `<name>.trellis`, the packed tiles, int16 `[in / 16, out / 16, 16 k]`; `<name>.suh` and
`<name>.svh`, the scales of inputs and outputs with the signs of the rotation, float16; a scalar `<name>.mul1` or
`<name>.mcg`, the multiplier of the code (without either, it is `3inst`); and `<name>.bias`, float16. Linears that are
not compressed are as they were.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from nowag_pl.models.compressed_head import compressed_head, tied_embedding
from nowag_pl.models.format.exl3_reading import METHOD
from nowag_pl.models.format.folder import QUANTIZATION_FILE, BlockwiseModel, FolderConfig, sharded, write_folder
from nowag_pl.models.state import compressed_linears, plain_tensors
from nowag_pl.modules import CompressedLinear, TrellisLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPLE = 128  # of the sizes
_MULTIPLIERS = {"mul1": 0x83DCD12D, "mcg": 0xCBAC1FED, "3inst": None}
_MAX_SHARD_BYTES = 5 * 10**9


def reason_against_exl3(linear: CompressedLinear) -> str | None:
    """Return why a linear cannot be stored in this format, with what to change, or None if it can.

    Args:
        linear: any compressed linear; it may be on the meta device.
    """
    if not isinstance(linear, TrellisLinear):
        return f"linears on a trellis (nowag_pl.NoWagTrellis), but got a {type(linear).__name__}"
    if linear.state_bits != 16:
        return f"state_bits 16, but got {linear.state_bits}"
    if linear.rotation != "both":
        return f"rotation 'both', but got {linear.rotation!r}"
    if linear.code not in _MULTIPLIERS:
        return f"a code among {', '.join(_MULTIPLIERS)}, but got {linear.code!r}"
    padded = (len(linear.out_scale), len(linear.in_scale))
    if any(size % MULTIPLE for size in padded):
        return (
            f"sizes that {MULTIPLE} divides or that are padded to it (multiple 128), but got {padded[0]} x {padded[1]}"
        )
    return None


def check_exl3(linears: Mapping[str, CompressedLinear]) -> None:
    """Refuse linears that this format cannot hold.

    Args:
        linears: by their name in the model.

    Raises:
        ValueError: there is one; the message names it.
    """
    for name, linear in linears.items():
        reason = reason_against_exl3(linear)
        if reason is not None:
            raise ValueError(f"{name}: Expected, with export.format=exl3, {reason}.")


def exl3_tensors(linear: TrellisLinear) -> dict[str, Tensor]:
    """Return what is stored of a linear, by the ends of its names.

    Args:
        linear: one that :func:`reason_against_exl3` has nothing against.
    """
    stored = linear.storage()
    tensors = {
        "trellis": stored["codes"].view(torch.int16),
        "suh": stored["in_scale"].half(),
        "svh": stored["out_scale"].half(),
    }
    multiplier = _MULTIPLIERS[linear.code]
    if multiplier is not None:
        # The 32 bits of an unsigned number.
        tensors[linear.code] = torch.tensor(multiplier - 2**32, dtype=torch.int32)
    if linear.bias is not None:
        padding = len(linear.out_scale) - linear.out_features
        tensors["bias"] = torch.nn.functional.pad(linear.bias.detach(), (0, padding)).half()
    return tensors


def save_exl3(
    model: "PreTrainedModel", folder: str | Path, source: str | None = None, max_shard_bytes: int = _MAX_SHARD_BYTES
) -> None:
    """Write a model whose compressed linears are on a trellis.

    Args:
        model: a transformers model.
        folder: folder to create, or whose model is replaced.
        source: model whose tokenizer goes along: "embedded", a folder or a hub id.
        max_shard_bytes: tensors in one file take no more, unless a single one is larger.

    Raises:
        ValueError: a linear does not fit the format.
        OSError: the folder cannot be written. What it held before is then as it was.
    """
    check_exl3(compressed_linears(model))
    described: dict[str, Any] = {}
    shards = sharded(_tensors(model, "", described), max_shard_bytes)
    dtype = cast(Tensor, model.get_input_embeddings().weight).dtype
    config = FolderConfig(dtype, described, quantization_file=QUANTIZATION_FILE)
    write_folder(Path(folder), model, shards, source, config)


def save_streamed_exl3(model: BlockwiseModel, load_block: Callable[[int], nn.Module], folder: str | Path) -> None:
    """Do as :func:`save_exl3` with a model that is never in memory as a whole, one file for each block.

    Args:
        model: where everything but the blocks comes from, with tokenizer and generation settings.
        load_block: gives a compressed block.
        folder: folder to create, or whose model is replaced.

    Raises:
        ValueError: a linear does not fit the format.
        OSError: the folder cannot be written. What it held before is then as it was.
    """
    described: dict[str, Any] = {}

    def shards() -> Iterator[dict[str, Tensor]]:
        for index in range(len(model)):
            yield dict(_tensors(load_block(index), f"{model.block_name(index)}.", described))
        yield dict(_tensors(model.skeleton, "", described))

    source, dtype = model.checkpoint.path, model.checkpoint.dtype
    config = FolderConfig(dtype, described, quantization_file=QUANTIZATION_FILE)
    write_folder(Path(folder), model.skeleton, shards(), source, config)


def _tensors(module: nn.Module, prefix: str, described: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a module by their names in the model, and describe them as they come."""
    yield from ((f"{prefix}{name}", tensor) for name, tensor in plain_tensors(module))
    if (given := tied_embedding(module)) is not None and (head := compressed_head(module)) is not None:
        # The format has a matrix of its own for the embeddings.
        yield given, head.weight.half()
    for inner_name, linear in compressed_linears(module).items():
        name = f"{prefix}{inner_name}"
        check_exl3({name: linear})
        assert isinstance(linear, TrellisLinear)
        tensors = {f"{name}.{key}": tensor for key, tensor in exl3_tensors(linear).items()}
        _describe(described, name, linear, tensors)
        if linear is compressed_head(module):
            described["head_bits"] = linear.bits
        else:
            described["bits"] = _mean_bits(described["tensor_storage"])
        yield from tensors.items()


def _describe(described: dict[str, Any], name: str, linear: TrellisLinear, tensors: Mapping[str, Tensor]) -> None:
    """Enter a linear in the `quantization_config`."""
    if not described:
        described |= {"quant_method": METHOD, "bits": 0.0, "codebook": linear.code, "tensor_storage": {}}
    shapes = {
        key: {"shape": list(tensor.shape), "torch_dtype": str(tensor.dtype).removeprefix("torch.")}
        for key, tensor in tensors.items()
    }
    entry = {"stored_tensors": shapes, "quant_format": METHOD, "bits_per_weight": linear.bits}
    if _MULTIPLIERS[linear.code] is not None:
        entry[f"{linear.code}_multiplier"] = _MULTIPLIERS[linear.code]
    described["tensor_storage"][name] = entry


def _mean_bits(storage: Mapping[str, Any]) -> float:
    """Return the mean bits of the weights of all linears so far; the head, which comes last, is told apart."""
    shapes = [entry["stored_tensors"][f"{name}.trellis"]["shape"] for name, entry in storage.items()]
    weights = [256 * shape[0] * shape[1] for shape in shapes]
    total = sum(entry["bits_per_weight"] * count for entry, count in zip(storage.values(), weights, strict=True))
    return round(total / sum(weights), 4)
