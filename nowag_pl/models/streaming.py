"""Run a model with one decoder block in memory at a time.

The skeleton is the real model without its blocks' weights. Recorders in the blocks' places capture, in one forward of
the real model, the hidden states that enter block 0 and the arguments that each block is called with (masks,
position embeddings); so nothing here knows a family's conventions. The same trick runs what comes after the blocks.
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nowag_pl.models.assembly import empty_like_described
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.experts import routed_experts
from nowag_pl.models.family_checks import check_arguments, check_experts
from nowag_pl.models.selection import Selection, find_linears
from nowag_pl.models.state import check_linears, held_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockInputs(NamedTuple):
    """What the blocks of a model are called with for one batch."""

    hidden: Tensor  # [batch, seq_len, hidden], entering block 0
    arguments: list[dict[str, Any]]  # keyword arguments of each block


class StreamedModel:
    """A dense or compressed model whose decoder blocks are read from disk when they are asked for.

    Args:
        checkpoint: where the weights are.
        device: where computations happen; embeddings and head stay there, blocks only while they are used.
        selection: which linears are compressed, where any are.

    Raises:
        ValueError: the checkpoint is damaged, its decoder blocks are not found, or they hold experts of an unknown
            layout; or the selection does not fit the model.
    """

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu", selection: Selection | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        with torch.inference_mode(False):  # a validation may build it; some families change their buffers
            self.skeleton = checkpoint.build(empty=True).eval()
        self.blocks_name = find_blocks(self.skeleton)
        blocks = cast(nn.ModuleList, self.skeleton.get_submodule(self.blocks_name))
        check_experts(checkpoint.config.model_type, self.blocks_name, blocks)
        empty_like_described(self.skeleton, checkpoint.compressed_linears)
        self.blocks = list(blocks.children())  # on meta, never filled
        self.skeleton.set_submodule(self.blocks_name, nn.ModuleList())
        checkpoint.require(
            f"{self.block_name(index)}.{name}" for index, block in enumerate(self.blocks) for name in block.state_dict()
        )
        self._checked: set[str] = set()  # beginnings of the names of compressed linears
        self._load(self.skeleton, "")
        self.skeleton.requires_grad_(False)
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._selected = None if selection is None else selection.of(self.linear_names)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state."""
        return self.skeleton.get_input_embeddings().weight.shape[1]

    def block_name(self, index: int) -> str:
        """Return the name of a block in the model, such as "model.layers.3"."""
        return f"{self.blocks_name}.{index}"

    @property
    def linear_names(self) -> list[list[str]]:
        """The whole names of all linears of each block."""
        return [
            [f"{self.block_name(index)}.{name}" for name in find_linears(block)]
            for index, block in enumerate(self.blocks)
        ]

    @property
    def has_experts(self) -> bool:
        """Whether a router sends the tokens of any block to experts."""
        return any(routed_experts(block) for block in self.blocks)

    def linears(self, index: int, block: nn.Module | None = None) -> dict[str, nn.Linear]:
        """Return the selected linears of a block by their name in it.

        Args:
            index: number of the block.
            block: the block, as :meth:`load_block` gave it; None: one whose linears hold no weights.
        """
        found = find_linears(self.blocks[index] if block is None else block)
        if self._selected is None:
            return found
        prefix = self.block_name(index)
        return {name: linear for name, linear in found.items() if f"{prefix}.{name}" in self._selected}

    def load_block(self, index: int, linears: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """Read a block from disk.

        Args:
            index: its number.
            linears: what takes the place of some of its linears, which are not read then.
        """
        block = copy.deepcopy(self.blocks[index])
        for name, linear in (linears or {}).items():
            block.set_submodule(name, linear)
        self._load(block, self.block_name(index) + ".", tuple(f"{name}." for name in linears or {}))
        return block.requires_grad_(False).eval()

    def _load(self, module: nn.Module, prefix: str, replaced: tuple[str, ...] = ()) -> None:
        """Fill the parameters and persistent buffers of `module` from the checkpoint, but for what is replaced."""
        names = {name for name in module.state_dict() if not name.startswith(replaced)}
        tied = set()
        if not prefix and self.skeleton.config.tie_word_embeddings:
            tied = {name for name in names if name not in self.checkpoint.weight_map}
        tensors = self.checkpoint.read([prefix + name for name in sorted(names - tied)], self.device)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        state = held_state(module, own, self.checkpoint.dtype)
        try:
            module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"Expected weights in {self.checkpoint.folder} of the shapes that its config.json says, but got: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from error
        if tied:
            self.skeleton.tie_weights()
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise ValueError(f"Expected {self.checkpoint.folder} to hold {prefix + name!r}, but it is not there.")
        if prefix not in self._checked and not replaced:
            check_linears(module, prefix)
            self._checked.add(prefix)
        module.to(self.device)

    def forward_block(self, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run one block, whether its family returns a tensor or a tuple.

        Args:
            block: a dense or compressed block.
            hidden: `[batch, seq_len, hidden]`.
            arguments: as recorded by :meth:`embed`.
        """
        output = block(hidden, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def embed(self, tokens: Tensor) -> BlockInputs:
        """Record what the blocks are called with.

        Args:
            tokens: `[batch, seq_len]`.

        Raises:
            ValueError: the model does not call one block after the other, each with what the one before returned.
        """
        calls: list[tuple[Tensor, dict[str, Any]]] = []

        def record(hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
            calls.append((hidden, arguments))
            if len(calls) == len(self):
                raise _Recorded  # before the head makes logits that nobody needs
            return hidden

        with suppress(_Recorded):
            self._run([record] * len(self), tokens)
        if len(calls) != len(self) or any(hidden is not calls[0][0] for hidden, _ in calls):
            raise ValueError(
                f"Expected {type(self.skeleton).__name__} to pass hidden states from block to block as they are, but "
                f"got {len(calls)} calls of {len(self)} blocks with something between: this family is not supported."
            )
        return BlockInputs(calls[0][0], [arguments for _, arguments in calls])

    def arguments(self, index: int, batch_size: int, seq_len: int) -> dict[str, Any]:
        """Return what a block is called with beside hidden states; it depends on their shape, not on the tokens.

        Args:
            index: number of the block.
            batch_size: sequences.
            seq_len: tokens in each.

        Raises:
            ValueError: it depends on the tokens.
        """
        shape = (batch_size, seq_len)
        if shape not in self._arguments:
            others = torch.arange(batch_size * seq_len).view(shape) % self.checkpoint.vocab_size
            arguments, of_others = (self.embed(tokens).arguments for tokens in (torch.zeros_like(others), others))
            check_arguments(self.checkpoint.config.model_type, arguments, of_others)
            self._arguments[shape] = arguments
        return self._arguments[shape][index]

    def head(self, hidden: Tensor, differentiable: bool = False) -> Tensor:
        """Run what comes after the blocks.

        Args:
            hidden: output of the last block `[batch, seq_len, hidden]`.
            differentiable: whether gradients flow back to it.

        Returns:
            Logits `[batch, seq_len, vocabulary]`.
        """
        hidden = hidden.to(self.device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        return self._run([lambda _hidden, _arguments: hidden] * len(self), tokens, differentiable)

    def _run(
        self, stand_ins: list[Callable[[Tensor, dict[str, Any]], Tensor]], tokens: Tensor, differentiable: bool = False
    ) -> Tensor:
        """Run the real model with a stand-in for each of its blocks."""
        places = [_StandIn(block, call) for block, call in zip(self.blocks, stand_ins, strict=True)]
        self.skeleton.set_submodule(self.blocks_name, nn.ModuleList(places))
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(differentiable):  # blocks may train with it
                return self.skeleton(input_ids=tokens.to(self.device).long(), use_cache=False).logits
        finally:
            self.skeleton.set_submodule(self.blocks_name, nn.ModuleList())


class _Recorded(Exception):  # noqa: N818 - no error
    """All blocks have been called."""


class _StandIn(nn.Module):
    """Takes a block's place; has the block's other attributes, which some families look at."""

    def __init__(self, block: nn.Module, call: Callable[[Tensor, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is no submodule
        self._call = call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden_states: Tensor, *positional: Any, **arguments: Any) -> Tensor:
        names = list(inspect.signature(self._block[0].forward).parameters)[1:]
        return self._call(hidden_states, dict(zip(names, positional, strict=False)) | arguments)


def find_blocks(model: "PreTrainedModel") -> str:
    """Return the name of the list of decoder blocks.

    Raises:
        ValueError: there is not exactly one list of `num_hidden_layers` modules.
    """
    count = model.config.num_hidden_layers
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    names = [name for name in names if not any(name.startswith(f"{outer}.") for outer in names)]
    if len(names) != 1:
        raise ValueError(
            f"Expected {type(model).__name__} to have one list of {count} decoder blocks, but found "
            f"{names or 'none'}: this family is not supported."
        )
    return names[0]
