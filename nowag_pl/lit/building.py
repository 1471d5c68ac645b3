"""The source of a module's model: its checkpoint, or the compressed model of a run."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nowag_pl.lit.sharding import shard
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.descriptions import empty_linears
from nowag_pl.models.format.saving import is_compressed, load_compressed
from nowag_pl.models.sharded_copy import ShardedCopy
from nowag_pl.models.shards import RowSource, fill_shards, shell
from nowag_pl.models.state import held_state
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.compression_run import CompressedModel, CompressionRun
from nowag_pl.stages.plan import Plan


def begin_run(
    checkpoint: Checkpoint, run_dir: str | Path | None, random_init: bool, plan: Plan, device: torch.device
) -> CompressionRun:
    """Return the stages over a dense checkpoint.

    Args:
        checkpoint: dense model.
        run_dir: folder of the artefacts.
        random_init: whether the model has random weights instead.
        plan: the stages of the run.
        device: device of the computations.

    Raises:
        ValueError: there is no run directory, or no dense model to compress.
    """
    if run_dir is None:
        raise ValueError("Expected a run_dir for the artefacts of a compression, but got none.")
    if random_init or is_compressed(checkpoint.folder):
        state = "has random weights" if random_init else "is compressed already"
        raise ValueError(
            f"Expected a dense model to compress, but {checkpoint.path} {state}. Set compression.enabled to false to "
            "train or measure it unchanged."
        )
    return CompressionRun(checkpoint, run_dir, plan, device)


def build_whole(
    checkpoint: Checkpoint, compressed: CompressedModel | None, random_init: bool, verify: bool
) -> nn.Module:
    """Return the whole model in host memory.

    Args:
        checkpoint: dense or compressed model.
        compressed: the result of a run, which is preferred to the checkpoint; None if there is none.
        random_init: start from random weights instead of the checkpoint's.
        verify: compare the files of a compressed checkpoint with their checksums.
    """
    if compressed is not None:
        return compressed.assemble()
    if random_init:
        return checkpoint.build()
    if is_compressed(checkpoint.folder):
        return load_compressed(checkpoint.folder, checkpoint.dtype, verify, packed=True)
    return checkpoint.load()


def build_sharded(
    checkpoint: Checkpoint,
    compressed: CompressedModel | None,
    random_init: bool,
    mesh: DeviceMesh,
    prepare: Callable[[nn.Module], object],
) -> nn.Module:
    """Return a model of which this process holds its shards, and never held more than a block beside them.

    A model of random weights is made whole in every process: their order is that of one process.

    Args:
        checkpoint: dense or compressed model.
        compressed: the result of a run, which is preferred to the checkpoint; None if there is none.
        random_init: start from random weights instead of the checkpoint's.
        mesh: ranks, one-dimensional.
        prepare: sets the types of the parameters, which may be on the meta device, and whether they are trained.

    Raises:
        ValueError: the stored model is damaged.
    """
    if random_init:
        model = checkpoint.build()
        prepare(model)
        shard(model, mesh, checkpoint.dtype)
        return model
    source: RowSource
    if compressed is not None:
        source = rows = compressed.rows()
        empty = shell(compressed.checkpoint, rows.descriptions)
    else:
        _check_shares(checkpoint, Ranks.current())
        source, empty = checkpoint, shell(checkpoint, checkpoint.compressed_linears)
    prepare(empty)
    shard(empty, mesh, checkpoint.dtype)
    fill_shards(empty, source, device_of(mesh))
    return empty


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return this process's device of a mesh."""
    return torch.device("cpu") if mesh.device_type == "cpu" else torch.device("cuda", torch.cuda.current_device())


def empty_copy(checkpoint: Checkpoint, compressed: CompressedModel | None) -> ShardedCopy:
    """Return an empty copy of the model that :func:`build_sharded` returns."""
    if compressed is None:
        return ShardedCopy(checkpoint, shell(checkpoint, checkpoint.compressed_linears))
    return ShardedCopy(checkpoint, shell(compressed.checkpoint, compressed.rows().descriptions))


def _check_shares(checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Compare files with their checksums, and look at the values of compressed linears, each process at its share."""

    def check() -> None:
        checkpoint.check_files(ranks.rank, ranks.world_size)
        linears = empty_linears(checkpoint.compressed_linears)
        for name in ranks.share(sorted(linears)):
            linear = linears.pop(name)
            stored = checkpoint.read_rows({f"{name}.{key}": slice(None) for key in linear.state_dict()})
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items()}
            linear.load_state_dict(held_state(linear, own), assign=True)
            try:
                linear.check()
            except ValueError as error:
                raise ValueError(f"{name} is damaged: {error}") from error

    ranks.gather_work(check)
