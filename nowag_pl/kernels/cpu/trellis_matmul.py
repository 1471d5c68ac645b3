"""Products of a few tokens with packed tiles of the code `mul1` on a CPU, compiled by Numba when they are first used.

Sixteen weights at a time are cut from the stream of a tile, turned into the byte sums of their states, and multiplied:
no table is read and only sums are written. The order of a tile puts all its rows of two of its columns in 32
steps, so that eight registers add up sixteen outputs. The factor and the offset of the code come in at the end; its
values are not rounded to float16 on the way, which moves them by 2^-11 of their size at most.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int16
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from nowag_pl.kernels.cpu.threads import in_threads

_LANES, _COLUMNS = 16, 8
# One instruction for seven: 8.5 instead of 5.8 G weights a second at 2 bits.
_HAS_BYTE_SUMS = get_host_cpu_features().get("avx512vnni", False)
_AHEAD = 8  # tiles that are asked for before they are read
_FACTOR, _OFFSET = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)
_WORD, _INDEX = ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_WORD, _LANES)


def multiply(
    tokens: Float[Tensor, "tokens in"], packed: Int16[Tensor, "in_tiles out_tiles words"], state_bits: int
) -> Float[Tensor, "tokens out"]:
    """Return the products of tokens with the numbers of packed tiles, float32.

    Args:
        tokens: activations, rotated and scaled, float32; as many as the tiles have rows.
        packed: tiles of the code `mul1`.
        state_bits: L.
    """
    num_out = packed.shape[1]
    rows = np.array([2 * (step // 8 % 4) + step % 2 + 8 * (step // 2 % 2) for step in range(2 * _LANES)])
    tokens = tokens.detach()
    inputs = tokens.unflatten(1, (-1, 16))[:, :, rows].contiguous().numpy()  # [tokens, in_tiles, 32]
    words = packed.contiguous().numpy().view(np.int32)
    sums = np.empty((len(tokens), 16 * num_out), np.float32)
    work = _multiply_kernel(packed.shape[2] // 16, state_bits)
    in_threads(lambda first, last: work(first, last, inputs, words, sums), 0, num_out)
    offset = float(1024 * _FACTOR + _OFFSET) * tokens.sum(dim=1, keepdim=True)
    return torch.from_numpy(sums).mul_(float(_FACTOR)).add_(offset)


@lru_cache
@no_type_check  # Numba compiles plain functions
def _multiply_kernel(bits: int, state_bits: int) -> Callable[..., None]:
    add_tiles = _add_tiles(bits, state_bits)

    @numba.njit(nogil=True)
    def work(first: int, last: int, inputs: np.ndarray, words: np.ndarray, sums: np.ndarray) -> None:
        """Write the byte sums of some tiles of columns, times the inputs of each token."""
        lanes = np.empty((_COLUMNS, _LANES), np.float32)
        for out_tile in range(first, last):
            for token in range(len(inputs)):
                add_tiles(words[:, out_tile], inputs[token], lanes)
                for column in range(_COLUMNS):
                    low, high = np.float32(0), np.float32(0)
                    for lane in range(_LANES):
                        if lane & 4:
                            high += lanes[column, lane]
                        else:
                            low += lanes[column, lane]
                    sums[token, 16 * out_tile + column] = low
                    sums[token, 16 * out_tile + column + _COLUMNS] = high

    return work


@no_type_check
def _add_tiles(bits: int, state_bits: int) -> Any:
    """Return a function for Numba's code: (words of a column of tiles, inputs, lanes), which writes the last."""

    @intrinsic
    def add_tiles(context, words, inputs, lanes):
        def generate(target, builder, signature, arguments):
            arrays = [
                target.make_array(kind)(target, builder, value=value)
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            stride = builder.extract_value(arrays[0].strides, 0)
            count = builder.extract_value(arrays[0].shape, 0)
            _write_tiles(builder, *(array.data for array in arrays), stride, count, bits, state_bits)
            return target.get_dummy_value()

        return numba.void(words, inputs, lanes), generate

    return add_tiles


@no_type_check
def _write_tiles(builder, words, inputs, lanes, stride, count, bits: int, state_bits: int) -> None:
    """Write the loop over the tiles of a column; it carries eight registers of sums."""
    before, loop = builder.block, builder.append_basic_block("tiles")
    first = builder.ptrtoint(words, _INDEX)
    multiply_add = get_or_insert_function(builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), "llvm.fma.v16f32")
    builder.branch(loop)
    builder.position_at_end(loop)
    number, sums = builder.phi(_INDEX), [builder.phi(_FLOATS) for _ in range(_COLUMNS)]
    address = builder.add(first, builder.mul(number, stride))
    tile = builder.inttoptr(address, _WORD.as_pointer())
    _prefetch(builder, builder.add(address, builder.mul(stride, _INDEX(_AHEAD))), 32 * bits)
    places = builder.bitcast(builder.gep(inputs, [builder.mul(number, _INDEX(2 * _LANES))]), _FLOATS.as_pointer())
    halves = [builder.load(builder.gep(places, [_INDEX(half)]), align=4) for half in range(2)]
    following = list(sums)
    for group in range(2 * _COLUMNS):
        total = builder.uitofp(_byte_sums(builder, tile, group, bits, state_bits), _FLOATS)
        column = group // 2
        following[column] = builder.call(multiply_add, [total, halves[group % 2], following[column]])
    after_number = builder.add(number, _INDEX(1))
    carried = [(number, _INDEX(0), after_number)]
    carried += [(phi, _FLOATS([0.0] * _LANES), value) for phi, value in zip(sums, following, strict=True)]
    for phi, at_first, later in carried:
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_unsigned("<", after_number, count), loop, after)
    builder.position_at_end(after)
    rows = builder.bitcast(lanes, _FLOATS.as_pointer())
    for column, value in enumerate(following):
        builder.store(value, builder.gep(rows, [_INDEX(column)]), align=4)


@no_type_check
def _prefetch(builder, address, num_bytes: int) -> None:
    """Prefetch a tile that is soon needed: a column's tiles are too far apart for the processor to predict it."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
    prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    for line in range(0, num_bytes, 64):
        pointer = builder.inttoptr(builder.add(address, _INDEX(line)), byte)
        builder.call(prefetch, [pointer, flag(0), flag(3), flag(1)])


@no_type_check
def _byte_sums(builder, tile, group: int, bits: int, state_bits: int) -> Any:
    """Return the byte sums of sixteen states: cut from two words each, times a constant, folded twice."""
    ends = [bits * (_LANES * group + lane + 1) for lane in range(_LANES)]
    last = [(end - 1) // 32 for end in ends]
    before = [(word - 1) % (8 * bits) for word in last]
    low, high = _gather(builder, tile, last, before, 8 * bits)
    shifts = _WORDS([32 * (word + 1) - end for word, end in zip(last, ends, strict=True)])
    cut = get_or_insert_function(builder.module, ir.FunctionType(_WORDS, [_WORDS] * 3), "llvm.fshr.v16i32")
    state = builder.and_(builder.call(cut, [high, low, shifts]), _spread(2**state_bits - 1))
    mixed = builder.mul(state, _spread(0x83DCD12D))
    if _HAS_BYTE_SUMS:
        kind = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(dot, [_spread(0), mixed, _spread(0x01010101)])
    pairs = _spread(0x00FF00FF)
    two = builder.add(builder.and_(mixed, pairs), builder.and_(builder.lshr(mixed, _spread(8)), pairs))
    return builder.and_(builder.add(two, builder.lshr(two, _spread(16))), _spread(0xFFFF))


@no_type_check
def _gather(builder, tile, low: list[int], high: list[int], num_words: int) -> list[Any]:
    """Return two registers of words of a tile: from one short load, unless they are far from each other."""
    smallest, largest = min(*low, *high), max(*low, *high)
    count = min(1 << (largest - smallest).bit_length(), num_words)
    start = min(smallest, num_words - count)
    pointer = builder.bitcast(builder.gep(tile, [_INDEX(start)]), ir.VectorType(_WORD, count).as_pointer())
    few = builder.load(pointer, align=4)
    undefined = ir.Constant(few.type, ir.Undefined)
    return [builder.shuffle_vector(few, undefined, _WORDS([word - start for word in each])) for each in (low, high)]


@no_type_check
def _spread(number: int) -> Any:
    """Return a register with the number in each lane."""
    return _WORDS([number] * _LANES)
