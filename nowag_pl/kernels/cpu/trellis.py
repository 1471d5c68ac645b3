"""The best path of many sequences through a bitshift trellis on a CPU, compiled by Numba when it is first used.

The states before a step that lead to the same states after it have their low L - k bits in common, so that a step keeps
one cost for each of those: 2^(L-k) of them, which stay in the caches of a core. Sixteen lanes of a register stand for
sixteen neighbouring states; which of the 2^k predecessors won is written as k bits for each, so that 256 steps of 2^16
states leave a megabyte. Numba does not vectorise such a loop by itself: its instructions are given in LLVM's terms.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int, Int16
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from nowag_pl.kernels.cpu.threads import in_threads

_MAX_LANES = 16  # states in a register of AVX-512; elsewhere several registers stand for one
_WORD, _MASK, _INDEX = ir.IntType(32), ir.IntType(16), ir.IntType(64)
_compiled = numba.njit(nogil=True)


def find_path(
    targets: Float[Tensor, "n steps"],
    roots: Float[Tensor, "n steps"] | None,
    values: Float[Tensor, " states"],
    bits: int,
    starts: Int[Tensor, " n"] | None,
    ends: Int[Tensor, " n"] | None,
) -> Int[Tensor, "n steps"]:
    """Return the states of the best path of each sequence, int32.

    Args:
        targets: numbers to come close to, float32.
        roots: square roots of the weights of their squared errors; None for ones.
        values: number that each state stands for, float32.
        bits: k, which a step shifts in.
        starts: L - k bits before the first step, int32; None if they are free.
        ends: low L - k bits of the last state, int32; None if they are free.
    """
    states = torch.empty(targets.shape, dtype=torch.int32)
    state_bits = len(values).bit_length() - 1
    free = torch.full((len(targets),), -1, dtype=torch.int32)
    roots = torch.ones(()).expand(targets.shape) if roots is None else roots
    bounds = [free if each is None else each for each in (starts, ends)]
    arrays = [tensor.detach().numpy() for tensor in (targets, roots, values.contiguous(), *bounds, states)]
    search = _path_kernel(state_bits, bits)
    in_threads(lambda first, last: search(first, last, *arrays), 0, len(targets))
    return states


@lru_cache
@no_type_check  # Numba compiles plain functions
def _path_kernel(state_bits: int, bits: int) -> Callable[..., None]:
    kept = state_bits - bits
    lanes = min(_MAX_LANES, 2**kept)
    advance = _advance(state_bits, bits, lanes)

    @numba.njit(nogil=True)
    def search(
        first: int,
        last: int,
        targets: np.ndarray,
        roots: np.ndarray,
        values: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        states: np.ndarray,
    ) -> None:
        """Write the states of some sequences: a sweep that leaves the winners of all steps, then the way back."""
        num_steps = targets.shape[1]
        costs, following = np.empty(2**kept, np.float32), np.empty(2**kept, np.float32)
        winners = np.empty((num_steps, 2**kept // lanes, bits), np.uint16)
        for sequence in range(first, last):
            if starts[sequence] < 0:
                costs[:] = 0
            else:
                costs[:] = np.inf
                costs[starts[sequence]] = 0
            for step in range(num_steps):
                root = roots[sequence, step]
                advance(costs, following, values, winners[step], -root, root * targets[sequence, step])
                costs, following = following, costs
            place = np.int64(ends[sequence])
            if place < 0:
                place = np.argmin(costs)
            for step in range(num_steps - 1, -1, -1):
                state = place
                for bit in range(bits):
                    mask = np.int64(winners[step, place // lanes, bit])
                    state |= ((mask >> (place % lanes)) & 1) << (kept + bit)
                states[sequence, step] = state
                place = state >> bits

    return search


@no_type_check
def _advance(state_bits: int, bits: int, lanes: int) -> Any:
    """Return a function for Numba's code that takes one step and writes the next costs and the winners."""

    @intrinsic
    def advance(context, costs, following, values, winners, minus_root, scaled_target):
        def generate(target, builder, signature, arguments):
            arrays = [
                target.make_array(kind)(target, builder, value=value).data
                for kind, value in zip(signature.args[:4], arguments[:4], strict=True)
            ]
            _write_advance(builder, *arrays, *arguments[4:], state_bits, bits, lanes)
            return target.get_dummy_value()

        scalar = numba.float32
        return numba.void(costs, following, values, winners, scalar, scalar), generate

    return advance


@no_type_check
def _write_advance(
    builder, costs, following, values, winners, minus_root, scaled_target, state_bits: int, bits: int, lanes: int
) -> None:
    """Write the loop over all places, `lanes` of them at a time; a tournament of 2^k predecessors decides each."""
    floats, kept = ir.VectorType(ir.FloatType(), lanes), state_bits - bits
    multiply_add = get_or_insert_function(
        builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{lanes}f32"
    )
    factor, offset = (_spread(builder, scalar, lanes) for scalar in (minus_root, scaled_target))
    before, loop = builder.block, builder.append_basic_block("places")
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(_INDEX)
    place = builder.mul(number, _INDEX(lanes))

    def candidate(high: int) -> Any:
        state = builder.add(place, _INDEX(high << kept))
        error = builder.call(multiply_add, [_load(builder, values, state, lanes), factor, offset])
        cost = _load_repeated(builder, costs, builder.lshr(state, _INDEX(bits)), bits, lanes)
        return builder.call(multiply_add, [error, error, cost])

    def tournament(lowest: int, count: int) -> tuple[Any, list[Any]]:
        if count == 1:
            return candidate(lowest), []
        least, which = tournament(lowest, count // 2)
        other, other_which = tournament(lowest + count // 2, count // 2)
        is_less = builder.fcmp_ordered("<", other, least)
        which = [builder.select(is_less, *pair) for pair in zip(other_which, which, strict=True)]
        return builder.select(is_less, other, least), [*which, is_less]

    least, which = tournament(0, 2**bits)
    _store(builder, following, place, least)
    for bit, mask in enumerate(which):
        word = builder.bitcast(mask, ir.IntType(lanes))
        word = word if lanes == _MAX_LANES else builder.zext(word, _MASK)
        index = builder.add(builder.mul(number, _INDEX(bits)), _INDEX(bit))
        builder.store(word, builder.gep(winners, [index]))
    number.add_incoming(_INDEX(0), before)
    after_number = builder.add(number, _INDEX(1))
    number.add_incoming(after_number, builder.block)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_unsigned("<", after_number, _INDEX(2**kept // lanes)), loop, after)
    builder.position_at_end(after)


@no_type_check
def _load(builder, array, index, count: int) -> Any:
    pointer = builder.bitcast(builder.gep(array, [index]), ir.VectorType(ir.FloatType(), count).as_pointer())
    return builder.load(pointer, align=4)


@no_type_check
def _store(builder, array, index, register) -> None:
    builder.store(register, builder.bitcast(builder.gep(array, [index]), register.type.as_pointer()), align=4)


@no_type_check
def _load_repeated(builder, array, index, bits: int, lanes: int) -> Any:
    """Return a register with each of some neighbours in 2^bits lanes."""
    if 2**bits >= lanes:
        return _spread(builder, builder.load(builder.gep(array, [index])), lanes)
    few = _load(builder, array, index, lanes >> bits)
    where = ir.VectorType(_WORD, lanes)([lane >> bits for lane in range(lanes)])
    return builder.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), where)


@no_type_check
def _spread(builder, value, lanes: int) -> Any:
    """Return a register with the value in each lane."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _WORD(0))
    return builder.shuffle_vector(first, undefined, ir.VectorType(_WORD, lanes)([0] * lanes))


def decode(
    packed: Int16[Tensor, "in_tiles out_tiles words"], values: Float[Tensor, " states"], bits: int
) -> Float[Tensor, "out in"]:
    """Return the numbers of packed tiles of 16 x 16, float32.

    Args:
        packed: `16 k` words a tile.
        values: number that each state stands for, float32.
        bits: k.
    """
    num_in, num_out = packed.shape[:2]
    weight = torch.empty(16 * num_out, 16 * num_in)
    words = packed.contiguous().numpy().view(np.uint32)
    arrays = words, values.detach().contiguous().numpy(), weight.numpy()
    in_threads(lambda first, last: _decode(first, last, *arrays, bits), 0, num_out)
    return weight


@_compiled
@no_type_check
def _decode(first: int, last: int, words: np.ndarray, values: np.ndarray, weight: np.ndarray, bits: int) -> None:
    num_words, mask = words.shape[2], len(values) - 1
    for out_tile in range(first, last):
        for in_tile in range(len(words)):
            tile = words[in_tile, out_tile]
            window = np.uint64(tile[num_words - 1])
            position, loaded = 0, 0
            for place in range(256):
                position += bits
                # The window ends with the word that holds the last bit of the symbol.
                while loaded * 32 < position:
                    window = (window << np.uint64(32)) | np.uint64(tile[loaded])
                    loaded += 1
                state = np.int64(window >> np.uint64(loaded * 32 - position)) & mask
                lane, index = place >> 3, place & 7
                row = 2 * (lane & 3) + (index & 1) + 4 * (index & 2)
                column = (lane >> 2) + 2 * (index & 4)
                weight[16 * out_tile + column, 16 * in_tile + row] = values[state]
