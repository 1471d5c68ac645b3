"""A model over ranks: sharded with FSDP2, compressed linears included, or whole with DDP."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nowag_pl.files import flush, temporary_name
from nowag_pl.lit.checkpoint_io import check_folder, digests_of, local_path, read_checkpoint, seal_folder
from nowag_pl.modules import CompressedLinear
from nowag_pl.modules.experts import RoutedExperts


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices of all nodes."""

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Make the process group and a mesh of all of its ranks; Lightning's own default is one rank per node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint of all ranks beside its place, sealed with digests, and rename it; all must call.

        Raises:
            ValueError: the path is an address.
            OSError: it cannot be written.
        """
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        place: Path = local_path(self.broadcast(filepath))
        stage: Path = self.broadcast(temporary_name(place))
        super().save_checkpoint(checkpoint, stage, storage_options)
        self.barrier()
        digests: list[Any] = [None] * self.world_size
        names = sorted(path.name for path in stage.iterdir())
        # Every rank reads its share, as together they may be larger than one machine reads in a short time.
        dist.all_gather_object(digests, digests_of(stage, names[self.global_rank :: self.world_size]))
        if self.is_global_zero:
            seal_folder(stage, {name: digest for part in digests for name, digest in part.items()})
            _take_place(stage, place)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without running code, after a look at its digests where it is a folder.

        Raises:
            ValueError: it is not there, damaged, or holds more than tensors and plain values.
        """
        path, problem = local_path(self.broadcast(checkpoint_path)), None
        if self.is_global_zero:
            # What is wrong has to reach the other ranks, which wait for it.
            try:
                if path.is_dir():
                    check_folder(path, required=False)
                else:
                    read_checkpoint(path)
            except (OSError, ValueError) as error:
                problem = str(error)
        if problem := self.broadcast(problem):
            raise ValueError(f"Expected {path} to be a whole checkpoint, but got: {problem}")
        return super().load_checkpoint(path, weights_only=True)


def _take_place(stage: Path, place: Path) -> None:
    """Put a finished folder in the place of an earlier checkpoint."""
    earlier = temporary_name(place)
    if place.exists():
        place.rename(earlier)
    stage.rename(place)
    flush(place.parent)
    if earlier.is_dir():
        shutil.rmtree(earlier)
    else:
        earlier.unlink(missing_ok=True)


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all devices of all nodes")


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shard the parameters of a model, and masks and codes, which become parameters without gradients.

    A compressed linear is a group of its own, as its parameters have types of their own and it computes in that of its
    input; the rest of each block is a group, and the rest of the model is one.

    Args:
        model: model with at least one list of blocks, perhaps on the meta device.
        mesh: ranks, one-dimensional.
        dtype: type in which everything but compressed linears computes.

    Raises:
        ValueError: it has experts that are taken apart.
    """
    check_shardable(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            _unify_types(module)
            _make_parameters(module)
            fully_shard(module, mesh=mesh)
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def check_shardable(*modules: nn.Module) -> None:
    """Refuse experts that are taken apart, whose linears FSDP2 does not gather one by one.

    Args:
        modules: a model, or its blocks.

    Raises:
        ValueError: there are any.
    """
    if any(isinstance(each, RoutedExperts) for module in modules for each in module.modules()):
        raise ValueError("Expected a model without experts for trainer.strategy=fsdp2, but got one with experts.")


def _unify_types(linear: CompressedLinear) -> None:
    """Hold the trained parameters of a linear in one type, as FSDP2 needs it: float32 where they differ."""
    trained = [parameter for parameter in linear.parameters() if parameter.requires_grad]
    if len({parameter.dtype for parameter in trained}) > 1:
        for parameter in trained:
            parameter.data = parameter.data.float()


def _make_parameters(linear: CompressedLinear) -> None:
    """Hold masks and codes as parameters, as FSDP2 leaves buffers whole."""
    for name, buffer in list(linear.named_buffers()):
        delattr(linear, name)
        linear.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


def reshard(model: nn.Module) -> None:
    """Let every group of a model hold its shards alone; the root keeps whole parameters after a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def ignore_buffers_in_ddp(module: nn.Module) -> None:
    """Keep DDP from sending buffers around: masks and codes are equal on every rank."""
    module._ddp_params_and_buffers_to_ignore = [name for name, _ in module.named_buffers()]  # type: ignore[assignment]
