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
from nowag_pl.models.compressed_head import compressed_head, head_name, tie, tied_embedding, untie
from nowag_pl.models.experts import routed_experts
from nowag_pl.models.family_checks import check_arguments, check_experts
from nowag_pl.models.selection import Selection, find_linears
from nowag_pl.models.state import check_linears, held_state
from nowag_pl.modules import CompressedLinear

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
        device: where computations happen; embeddings and head are there until a block is read, blocks only while they
            are used.
        selection: which linears are compressed, where any are.
        head: a compressed head in the place of the dense one.

    Raises:
        ValueError: the checkpoint is damaged, its decoder blocks are not found, or they hold experts of an unknown
            layout; or the selection does not fit the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        selection: Selection | None = None,
        head: CompressedLinear | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        with torch.inference_mode(False):  # a validation may build it; some families change their buffers
            self._skeleton = checkpoint.build(empty=True).eval()
        self.blocks_name = find_blocks(self._skeleton)
        blocks = cast(nn.ModuleList, self._skeleton.get_submodule(self.blocks_name))
        check_experts(checkpoint.config.model_type, self.blocks_name, blocks)
        empty_like_described(self._skeleton, checkpoint.compressed_linears)
        self._head = head
        if head is not None:
            self._skeleton.set_submodule(str(head_name(self._skeleton)), head)
            untie(self._skeleton)
        self.blocks = list(blocks.children())  # on meta, never filled
        self._skeleton.set_submodule(self.blocks_name, nn.ModuleList())
        checkpoint.require(
            f"{self.block_name(index)}.{name}" for index, block in enumerate(self.blocks) for name in block.state_dict()
        )
        self._checked: set[str] = set()  # beginnings of the names of compressed linears
        self._is_there = False  # all but the blocks
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._selected = None if selection is None else selection.of(self.linear_names)
        # So that what is damaged is told now.
        assert self.skeleton

    @property
    def skeleton(self) -> "PreTrainedModel":
        """All but the blocks; it is read again after :meth:`release`."""
        if not self._is_there:
            self._load(self._skeleton, "", () if self._head is None else (f"{head_name(self._skeleton)}.",))
            self._skeleton.requires_grad_(False)
            self._is_there = True
        return self._skeleton

    def release(self) -> None:
        """Give the memory of embeddings, head and norms outside of the blocks back, until they are used."""
        if self._is_there:
            if (head := compressed_head(self._skeleton)) is not None:
                head.pack()
            # A head that was given is in no file.
            for module in (each for each in self._skeleton.modules() if each is not self._head):
                for name, parameter in module.named_parameters(recurse=False):
                    module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
            self._skeleton.tie_weights()
            self._is_there = False

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def hidden_size(self) -> int:
        """Length of a hidden state."""
        return self._skeleton.get_input_embeddings().weight.shape[1]

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
        """Read a block from disk. Embeddings and head are not held beside it, unless they are used again.

        Args:
            index: its number.
            linears: what takes the place of some of its linears, which are not read then.
        """
        self.release()
        block = copy.deepcopy(self.blocks[index])
        for name, linear in (linears or {}).items():
            block.set_submodule(name, linear)
        self._load(block, self.block_name(index) + ".", tuple(f"{name}." for name in linears or {}))
        return block.requires_grad_(False).eval()

    def _load(self, module: nn.Module, prefix: str, replaced: tuple[str, ...] = ()) -> None:
        """Fill the parameters and persistent buffers of `module` from the checkpoint, but for what is replaced."""
        names = {name for name in module.state_dict() if not name.startswith(replaced)}
        tied, given = set(), None if prefix else tied_embedding(self._skeleton)
        if not prefix and self._skeleton.config.tie_word_embeddings:
            tied = {name for name in names if name not in self.checkpoint.weight_map or name == given}
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
        if not prefix and (head := compressed_head(self._skeleton)) is not None:
            # Every batch needs it.
            head.unpack(self.checkpoint.dtype)
        if tied:
            tie(self._skeleton, self.checkpoint.dtype)
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
                f"Expected {type(self._skeleton).__name__} to pass hidden states from block to block as they are, but "
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
