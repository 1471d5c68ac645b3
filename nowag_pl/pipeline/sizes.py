"""Sizes of a model and of what a method makes of it, from shapes and settings alone."""

from dataclasses import dataclass
from typing import cast

from torch import nn

from nowag_pl.compressors import Compressor
from nowag_pl.models.assembly import empty_like_described
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel, find_blocks
from nowag_pl.modules import CompressedLinear


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model and of what a method makes of it, in bytes unless said otherwise.

    Attributes:
        num_blocks: decoder blocks.
        hidden: length of a hidden state.
        widest: longest input or output of a linear.
        vocabulary: number of token ids.
        itemsize: of a weight.
        skeleton: embeddings, head and norms outside of the blocks.
        block: largest dense block.
        largest_linear: weights of the largest linear.
        compressed_block: largest block, compressed.
        compressed: all compressed linears.
        others: all of the blocks that is not compressed.
        moments: second moments of all linears.
        restoring: per weight of the linear whose weight is made from its packed parts.
        compressing: of the linear that takes the most while it is compressed.
        full_moments: pairs of inputs in the full second moments of a block; 0 where the method needs none.
        weights: weights of all compressed linears.
        values: values in them that can be trained.
        keeping: per weight of all compressed linears, for gradients, while the whole model is trained.
    """

    num_blocks: int
    hidden: int
    widest: int
    vocabulary: int
    itemsize: int
    skeleton: int
    block: int
    largest_linear: int
    compressed_block: int
    compressed: int
    others: int
    moments: int
    restoring: float
    compressing: int
    full_moments: int
    weights: int = 0
    values: int = 0
    keeping: float = 0.0

    @classmethod
    def of(cls, model: StreamedModel, compressor: Compressor) -> "ModelSizes":
        """Return the sizes of a model whose weights need not be in memory.

        Raises:
            ValueError: the method does not fit the shape of a linear; the message names it.
        """
        itemsize = model.checkpoint.dtype.itemsize
        shapes: list[tuple[int, int]] = []
        blocks: list[int] = []
        compressed: list[int] = []
        others, full_moments, values = 0, 0, 0
        keeping = restoring = 0.0
        for index, block in enumerate(model.blocks):
            linears, size = model.linears(index), 0.0
            for name, linear in linears.items():
                shape = (linear.out_features, linear.in_features)
                try:
                    made = compressor.empty(shape, model.checkpoint.dtype)
                except ValueError as error:
                    raise ValueError(f"{model.block_name(index)}.{name}: {error}") from error
                shapes.append(shape)
                size += compressed_bytes(made, linear)
                values += linear.weight.numel() if made is None else sum(each.numel() for each in made.parameters())
                keeping += 16 * linear.weight.numel() if made is None else made.gradient_bytes
                per_weight = 16.0 if made is None else made.restoring_bytes / linear.weight.numel()
                restoring = max(restoring, per_weight)
            whole = sum(parameter.numel() for parameter in block.parameters()) * itemsize
            rest = whole - sum(linear.weight.numel() for linear in linears.values()) * itemsize
            blocks.append(whole)
            compressed.append(round(size))
            others += rest
            if compressor.full_second_moment:  # linears may share theirs, which shapes do not tell
                full_moments = max(full_moments, sum(linear.in_features**2 for linear in linears.values()))
        return cls(
            num_blocks=len(blocks),
            hidden=model.hidden_size,
            widest=max(max(shape) for shape in shapes),
            vocabulary=model.checkpoint.vocab_size,
            itemsize=itemsize,
            skeleton=sum(parameter.numel() for parameter in model.skeleton.parameters()) * itemsize,
            block=max(blocks),
            largest_linear=max(rows * columns for rows, columns in shapes),
            compressed_block=max(compressed),
            compressed=sum(compressed),
            others=others,
            moments=4 * sum(columns for _, columns in shapes),
            restoring=restoring,
            compressing=max(compressor.working_bytes(shape) for shape in shapes),
            full_moments=full_moments,
            weights=sum(rows * columns for rows, columns in shapes),
            values=values,
            keeping=keeping / sum(rows * columns for rows, columns in shapes),
        )

    @classmethod
    def as_it_is(cls, checkpoint: Checkpoint) -> "ModelSizes":
        """Return the sizes of a model to which no method is applied, dense or compressed already.

        Raises:
            ValueError: its decoder blocks are not found.
        """
        model, itemsize = checkpoint.build(empty=True), checkpoint.dtype.itemsize
        empty_like_described(model, checkpoint.compressed_linears)
        model.tie_weights()
        blocks = cast(nn.ModuleList, model.get_submodule(find_blocks(model)))
        made = [module for module in blocks.modules() if isinstance(module, CompressedLinear)]
        plain = [module for module in blocks.modules() if isinstance(module, nn.Linear)]
        widths = [width for linear in made for width in (linear.in_features, linear.out_features)]
        widths += [width for linear in plain for width in (linear.in_features, linear.out_features)]
        compressed_values = sum(parameter.numel() for linear in made for parameter in linear.parameters())
        block_values = sum(parameter.numel() for parameter in blocks.parameters())
        values = sum(parameter.numel() for parameter in model.parameters())
        block = max(sum(tensor.nbytes for tensor in each.state_dict().values()) for each in blocks)
        return cls(
            num_blocks=len(blocks),
            hidden=cast(nn.Embedding, model.get_input_embeddings()).embedding_dim,
            widest=max(widths),
            vocabulary=checkpoint.vocab_size,
            itemsize=itemsize,
            skeleton=(values - block_values) * itemsize,
            block=block,
            largest_linear=max((linear.in_features * linear.out_features for linear in made), default=0),
            compressed_block=block,
            compressed=sum(linear.storage_bytes for linear in made),
            others=(block_values - compressed_values) * itemsize,
            moments=0,
            restoring=max((each.restoring_bytes / _num_weights(each) for each in made), default=0.0),
            compressing=0,
            full_moments=0,
            weights=sum(map(_num_weights, made)),
            values=compressed_values,
            keeping=sum(linear.gradient_bytes for linear in made) / max(sum(map(_num_weights, made)), 1),
        )

    @property
    def is_compressed_here(self) -> bool:
        """Whether a method is applied, for which second moments are gathered."""
        return self.moments > 0

    def hidden_states(self, num_sequences: int, seq_len: int) -> int:
        """Return the size of hidden states of that many sequences."""
        return num_sequences * seq_len * self.hidden * self.itemsize

    def activations(self, num_tokens: int) -> int:
        """Return what a block holds beside its weights while that many tokens pass it."""
        return num_tokens * (4 * self.itemsize * self.hidden + (3 * self.itemsize + 8) * self.widest)


def compressed_bytes(made: CompressedLinear | None, linear: nn.Linear) -> float:
    """Return the size of a compressed linear without its bias; that of the dense one where it cannot be told."""
    return linear.weight.nbytes if made is None else made.bits_per_weight / 8 * linear.weight.numel()


def _num_weights(linear: CompressedLinear) -> int:
    return linear.in_features * linear.out_features
