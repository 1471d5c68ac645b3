"""Sizes of a model before and after compression, from the meta device and the methods' empty modules."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple, cast

from torch import nn

from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import settings_of
from nowag_pl.functional.chunks import CHUNK_BYTES, LOGIT_BYTES
from nowag_pl.models.assembly import empty_like_described
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.compressed_head import head_name
from nowag_pl.models.streaming import find_blocks
from nowag_pl.modules import CompressedLinear
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.head import head_method, head_of

TILE_BYTES = 2**25  # intermediate results of a tile of logits
UNTOLD_BYTES = 16  # per weight, to restore it, and for gradients, if a method does not know its result in advance

Methods = Mapping[str, Sequence[Compressor]]  # by whole name of a linear: its method, then others for a budget


class LinearSizes(NamedTuple):
    """Sizes of a compressed linear without its bias; or those of several, summed or the largest of each.

    Attributes:
        inputs: length of an input.
        weights: number of weights of the dense linear.
        values: number of values that can be trained.
        packed: bytes of masks and codes.
        held: bytes of values and `packed` in memory.
        stored: bytes on disk.
        candidates: bytes on disk with every setting that a budget may choose.
        restoring: bytes in addition to the weight while it is restored.
        keeping: bytes kept of the weight for gradients.
        compressing: bytes while it is compressed.
        pairs: pairs of inputs in its full second moment; 0 if none is gathered.
        output_pairs: pairs of outputs in its second moment of gradients; 0 if none is gathered.
        num_linears: number of linears.
    """

    inputs: int = 0
    weights: int = 0
    values: int = 0
    packed: int = 0
    held: int = 0
    stored: int = 0
    candidates: int = 0
    restoring: int = 0
    keeping: int = 0
    compressing: int = 0
    pairs: int = 0
    output_pairs: int = 0
    num_linears: int = 0

    @classmethod
    def of(cls, linear: nn.Linear | CompressedLinear, methods: Sequence[Compressor], itemsize: int) -> "LinearSizes":
        """Return the sizes of a compressed linear, or of a dense one after the first method.

        Raises:
            ValueError: that method does not fit the shape.
        """
        shape = (linear.out_features, linear.in_features)
        num_weights = shape[0] * shape[1]
        made = [linear] if isinstance(linear, CompressedLinear) else _made(linear, methods)
        stored = [num_weights * itemsize if each is None else each.storage_bytes for each in made]
        sizes = cls(shape[1], num_weights, stored=stored[0], candidates=sum(stored), num_linears=1)
        sizes = sizes._replace(compressing=max((method.working_bytes(shape) for method in methods), default=0))
        if (first := made[0]) is None:
            untold = UNTOLD_BYTES * num_weights
            return sizes._replace(values=num_weights, held=stored[0], restoring=untold, keeping=untold)
        values = [parameter for name, parameter in first.named_parameters() if name != "bias"]
        packed = sum(buffer.nbytes for buffer in first.buffers())
        return sizes._replace(
            values=sum(parameter.numel() for parameter in values),
            packed=packed,
            held=packed + sum(parameter.nbytes for parameter in values),
            restoring=first.restoring_bytes,
            keeping=first.gradient_bytes,
        )

    @classmethod
    def summed(cls, linears: Iterable["LinearSizes"]) -> "LinearSizes":
        """Return the sum of each size."""
        return cls(*map(sum, zip(*linears, strict=True)))

    @classmethod
    def largest(cls, linears: Iterable["LinearSizes"]) -> "LinearSizes":
        """Return the largest of each size."""
        return cls(*map(max, zip(*linears, strict=True)))


def _made(linear: nn.Linear, methods: Sequence[Compressor]) -> list[CompressedLinear | None]:
    """Return the modules that methods make of a linear; the first has to fit, others may be left out by a budget."""
    shape, dtype, has_bias = (linear.out_features, linear.in_features), linear.weight.dtype, linear.bias is not None
    made = [methods[0].empty(shape, dtype, has_bias)]
    for method in methods[1:]:
        with suppress(ValueError):
            made.append(method.empty(shape, dtype, has_bias))
    return made


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model before and after compression, in bytes unless said otherwise.

    Attributes:
        num_blocks: decoder blocks.
        hidden: length of a hidden state.
        widest: longest input or output of a linear.
        vocabulary: number of token ids.
        itemsize: bytes of a weight.
        skeleton: embeddings, head and norms outside of the blocks.
        others: all parts of the blocks that are not compressed.
        dense_block: largest block with dense linears.
        compressed_block: largest block with compressed linears, in memory.
        block_values: largest number of values that can be trained in a block.
        total: sums over all compressed linears.
        block: the largest sums over those of a block.
        linear: the largest of a linear.
        is_compressed_here: whether methods are applied, for which second moments are gathered.
        head: sizes of the head if it is compressed; zeros if not.
    """

    num_blocks: int
    hidden: int
    widest: int
    vocabulary: int
    itemsize: int
    skeleton: int
    others: int
    dense_block: int
    compressed_block: int
    block_values: int
    total: LinearSizes
    block: LinearSizes
    linear: LinearSizes
    is_compressed_here: bool
    head: LinearSizes = field(default_factory=LinearSizes)

    @classmethod
    def of(cls, checkpoint: Checkpoint, methods: Methods | None = None) -> "ModelSizes":
        """Return the sizes of a model, dense or compressed, whose weights need not be there.

        Args:
            checkpoint: the model.
            methods: methods of the linears to compress; None: nothing is compressed.

        Raises:
            ValueError: a method does not fit the shape of a linear; the message names it. Or the decoder blocks are
                not found.
        """
        model, itemsize = checkpoint.build(empty=True), checkpoint.dtype.itemsize
        empty_like_described(model, checkpoint.compressed_linears)
        model.tie_weights()
        name = find_blocks(model)
        blocks = list(cast(nn.ModuleList, model.get_submodule(name)))
        linears = [_linears(f"{name}.{number}", block, methods or {}, itemsize) for number, block in enumerate(blocks)]
        others = [_others(block, each) for block, each in zip(blocks, linears, strict=True)]
        sums = [LinearSizes.summed(each.values()) for each in linears]
        in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
        outside = (parameter for parameter in model.parameters() if id(parameter) not in in_blocks)
        return cls(
            num_blocks=len(blocks),
            hidden=cast(nn.Embedding, model.get_input_embeddings()).embedding_dim,
            widest=max(width for block in blocks for width in _widths(block)),
            vocabulary=checkpoint.vocab_size,
            itemsize=itemsize,
            skeleton=sum(parameter.numel() for parameter in outside) * itemsize,
            others=sum(others),
            dense_block=max(itemsize * each.weights + rest for each, rest in zip(sums, others, strict=True)),
            compressed_block=max(each.held + rest for each, rest in zip(sums, others, strict=True)),
            block_values=max(each.values + rest // itemsize for each, rest in zip(sums, others, strict=True)),
            total=LinearSizes.summed(sums),
            block=LinearSizes.largest(sums),
            linear=LinearSizes.largest(sizes for each in linears for sizes in each.values()),
            is_compressed_here=methods is not None,
            head=_head_sizes(model, methods or {}, itemsize),
        )

    @property
    def dense_blocks(self) -> int:
        """All blocks with dense linears."""
        return self.itemsize * self.total.weights + self.others

    @property
    def is_compressed(self) -> bool:
        """Whether any linear is compressed, here or before."""
        return self.total.weights > 0

    @property
    def stored(self) -> int:
        """The whole model on disk, with compressed linears."""
        return self.skeleton - self.itemsize * self.head.weights + self.head.stored + self.others + self.total.stored

    @property
    def trained_values(self) -> int:
        """The largest number of values trained end to end: in a compressed model, those in its blocks."""
        return self.total.values + (self.others + (0 if self.is_compressed else self.skeleton)) // self.itemsize

    @property
    def frozen_values(self) -> int:
        """The number of values not trained: embeddings and head of a compressed model."""
        return self.skeleton // self.itemsize if self.is_compressed else 0

    def hidden_states(self, num_sequences: int, seq_len: int) -> int:
        """Return the size of hidden states of that many sequences."""
        return num_sequences * seq_len * self.hidden * self.itemsize

    def activations(self, num_tokens: int) -> int:
        """Return the memory of a block in addition to its weights while that many tokens pass through it."""
        return num_tokens * (4 * self.itemsize * self.hidden + (3 * self.itemsize + 8) * self.widest)

    def stepping(self, num_tokens: int, mixed: bool, recompute: bool) -> int:
        """Return the memory of a step of a training for restored weights and activations.

        Args:
            num_tokens: tokens of a batch.
            mixed: whether it computes in 16 bits with weights in float32.
            recompute: whether blocks keep their inputs alone, and one block at a time all.
        """
        each = num_tokens * 4 * (13 * self.hidden + 5 * self.widest)
        # Weights that are not compressed have copies in 16 bits.
        copies = 2 * mixed * (self.trained_values - self.total.values)
        if recompute:
            inputs = 4 * num_tokens * self.hidden * self.num_blocks
            return self.block.keeping + copies + inputs + each
        return self.total.keeping + copies + self.num_blocks * each

    def passing(self, num_tokens: int, itemsize: int) -> int:
        """Return the memory in addition to a block while tokens pass through it: a restored weight, and activations."""
        weight = itemsize * self.linear.weights + self.linear.restoring
        return weight + self.activations(num_tokens) * itemsize // self.itemsize

    def measuring(self, num_tokens: int, max_bytes: int = CHUNK_BYTES) -> int:
        """Return the memory of logits while a batch is measured, some of its tokens at a time.

        Args:
            num_tokens: tokens of the batch.
            max_bytes: memory for logits that are measured together.
        """
        each = LOGIT_BYTES * self.vocabulary
        return min(each * num_tokens, max(max_bytes, each)) + min(each * num_tokens, TILE_BYTES)

    def forward(self, num_tokens: int, itemsize: int, max_bytes: int = CHUNK_BYTES) -> int:
        """Return the memory of a forward without gradients in addition to the model: of a block, or of logits."""
        hidden = itemsize * num_tokens * self.hidden
        return max(self.passing(num_tokens, itemsize), hidden + self.measuring(num_tokens, max_bytes))

    def answering(self, num_tokens: int) -> int:
        """Return the memory of questions to the whole model in addition to it, whose logits are all there at once."""
        logits = (2 * self.itemsize + 4) * num_tokens * self.vocabulary
        return max(self.passing(num_tokens, self.itemsize), logits)


def methods_of(run: CompressionRun) -> Methods:
    """Return the method of every linear that a run compresses, and the others that its budget may choose.

    Raises:
        ValueError: a pattern of the plan matches no linear.
    """
    settings, assignment = run.plan.compression, run.assignment
    assert settings is not None
    offered = [] if settings.budget is None else settings_of(settings.compressor, settings.budget)
    names = [
        f"{run.model.block_name(index)}.{name}" for index in range(len(run.model)) for name in run.model.linears(index)
    ]
    # Methods that a pattern gives are fixed.
    methods: dict[str, Sequence[Compressor]] = {
        name: offered if offered and name not in assignment.numbers else [assignment.method(name)] for name in names
    }
    if settings.head is not None:
        methods[head_of(run.model)[0]] = [head_method(settings.head, settings.compressor)]
    return methods


def _widths(block: nn.Module) -> list[int]:
    """Return the lengths of the inputs and outputs of a block's linears."""
    linears = [module for module in block.modules() if isinstance(module, nn.Linear | CompressedLinear)]
    return [width for linear in linears for width in (linear.in_features, linear.out_features)]


def _linears(block_name: str, block: nn.Module, methods: Methods, itemsize: int) -> dict[str, LinearSizes]:
    """Return the sizes of the compressed linears of a block by their name in it."""
    found = {}
    full = any(method.full_second_moment for each in methods.values() for method in each)
    coupled = any(method.output_moment for each in methods.values() for method in each)
    for name, module in block.named_modules():
        of_linear = methods.get(f"{block_name}.{name}", ())
        if isinstance(module, CompressedLinear) or of_linear:
            try:
                sizes = LinearSizes.of(cast(nn.Linear | CompressedLinear, module), of_linear, itemsize)
            except ValueError as error:
                raise ValueError(f"{block_name}.{name}: {error}") from error
            # Linears may share a second moment, which shapes do not show.
            found[name] = sizes._replace(
                pairs=sizes.inputs**2 * full, output_pairs=(sizes.weights // sizes.inputs) ** 2 * coupled
            )
    return found


def _head_sizes(model: nn.Module, methods: Methods, itemsize: int) -> LinearSizes:
    """Return the sizes of a head that is compressed, zeros if it is dense.

    Raises:
        ValueError: its method does not fit it.
    """
    name = head_name(model)
    if name is None or name not in methods:
        return LinearSizes()
    try:
        return LinearSizes.of(cast(nn.Linear, model.get_submodule(name)), methods[name], itemsize)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _others(block: nn.Module, linears: Mapping[str, LinearSizes]) -> int:
    """Return the bytes of a block's parameters except those of compressed linears; their biases are included."""
    return sum(
        parameter.nbytes
        for name, parameter in block.named_parameters()
        if name.rpartition(".")[0] not in linears or name.endswith(".bias")
    )


@dataclass(frozen=True)
class Holding:
    """The way in which processes hold a whole model.

    Attributes:
        num_ranks: processes of all nodes.
        sharded: whether parameters, gradients and states of the optimizer are divided among them (FSDP2).
        mixed: whether it computes in 16 bits with weights in float32.
        streams: whether a validation holds a block at a time.
        widened: whether a validation of the whole model has trained values in float32.
        random: whether it begins with random weights, which every process makes whole.
    """

    num_ranks: int = 1
    sharded: bool = False
    mixed: bool = False
    streams: bool = True
    widened: bool = False
    random: bool = False

    def parameters(self, sizes: ModelSizes) -> int:
        """Return the parameters of a model whose trained values are in float32, with its masks and codes."""
        # A sharded one computes in its own type, whatever the precision.
        frozen = sizes.itemsize if self.mixed or self.sharded else 4
        return 4 * sizes.trained_values + frozen * sizes.frozen_values + sizes.total.packed

    def share(self, sizes: ModelSizes, divisible: int) -> int:
        """Return one process's share of divisible bytes, with the groups that it gathers while it computes."""
        if not self.sharded or self.num_ranks == 1:
            return divisible
        gathered = 4 * (1 if sizes.is_compressed else 2) * (sizes.skeleton + 2 * sizes.compressed_block)
        return ceil(divisible / self.num_ranks) + gathered // sizes.itemsize

    def building(self, sizes: ModelSizes, parameters: int) -> int:
        """Return the host memory in which one process makes its part of a model, before that goes to the device.

        A sharded model is read a block at a time, and of a block the process's rows; of one linear all is looked at.

        Args:
            sizes: sizes of the model.
            parameters: of the whole model.
        """
        if not self.sharded or self.random:
            return parameters
        return max(ceil(max(sizes.compressed_block, sizes.skeleton) / self.num_ranks), sizes.linear.held)
