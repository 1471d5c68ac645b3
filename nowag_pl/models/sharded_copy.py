"""A whole copy of a sharded model, of which one block is in memory at a time."""

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.experts import routed_experts
from nowag_pl.models.shards import whole_state
from nowag_pl.models.streaming import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedCopy:
    """A whole copy of a sharded model, a block at a time.

    Args:
        checkpoint: source of tokenizer and generation settings.
        empty: the model, not sharded, on the meta device; it loses its blocks.

    Attributes:
        checkpoint: as given.
        skeleton: all of the model but its blocks.
    """

    def __init__(self, checkpoint: Checkpoint, empty: "PreTrainedModel") -> None:
        self.checkpoint, self.skeleton = checkpoint, empty
        self._blocks_name = find_blocks(empty)
        self._blocks = list(empty.get_submodule(self._blocks_name).children())
        empty.set_submodule(self._blocks_name, nn.ModuleList())

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def has_experts(self) -> bool:
        """Whether a router sends the tokens of any block to experts."""
        return any(routed_experts(block) for block in self._blocks)

    def block_name(self, index: int) -> str:
        """Return the name of a block in the model."""
        return f"{self._blocks_name}.{index}"

    def gather_skeleton(self, model: nn.Module, keep: bool) -> None:
        """Take over everything but the blocks from a sharded model; every process must call it."""
        state = whole_state(model, keep, without=self._blocks_name)
        if keep:
            self._fill(self.skeleton, state)
            self.skeleton.tie_weights()

    def gather_block(self, model: nn.Module, index: int, keep: bool) -> nn.Module:
        """Return a whole block, where it is kept, else an empty one; every process must call it."""
        block = copy.deepcopy(self._blocks[index])
        state = whole_state(model.get_submodule(self.block_name(index)), keep)
        return self._fill(block, state) if keep else block

    @staticmethod
    def _fill(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
        own = module.state_dict()
        module.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items()}, assign=True)
        return module
