"""Products with a vector-quantized weight of few rows on a CPU, compiled by Numba when they are first used.

For few rows, a table of the products of all codewords with a group of inputs costs more than it saves. Here a codeword
fills one register, and the sums of eight rows stay in eight others: with 4096 codewords of 6 weights that is 1.8 to 2.7
times as fast as a dense bfloat16 weight of 192 to 1536 rows.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Integer
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from nowag_pl.kernels.cpu.threads import MIN_CODES, in_threads
from nowag_pl.kernels.cpu.vq import compiled
from nowag_pl.kernels.cpu.vq_columns import scaled_groups

_ROWS = 8
_INDEX = ir.IntType(64)


def multiply_rows(
    tokens: Float[Tensor, "tokens in"],
    columns: Integer[Tensor, "groups out"],
    registers: Float[Tensor, "k lanes"],
    dim: int,
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
) -> Float[Tensor, "tokens out"]:
    """Return the products `y_ti = r2_i sum_g c[code_gi] . (r1 x_t)_g`.

    Each thread takes some of the rows.

    Args:
        tokens: activations x, float32.
        columns: codes, of any unsigned type, for at least 8 rows.
        registers: codewords c, padded with zeros to a power of two, float32.
        dim: their length without the padding.
        in_scale: r1, float32.
        out_scale: r2, float32.
    """
    codes, codewords, scales = columns.numpy(), registers.numpy(), out_scale.numpy()
    values = scaled_groups(tokens.numpy(), in_scale.numpy(), len(codes), dim, codewords.shape[1])
    sums = np.empty((len(values), codes.shape[1]), np.float32)
    add = _rows_kernel(codewords.shape[1], codes.itemsize)

    def share(first: int, last: int) -> None:
        add(first, last, codes, codewords, values, scales, sums)

    num_tiles = -(-codes.shape[1] // _ROWS)
    if codes.size < 2 * MIN_CODES:
        share(0, num_tiles)
    else:
        in_threads(share, 0, num_tiles)
    return torch.from_numpy(sums)


@lru_cache
@no_type_check  # Numba compiles plain functions
def _rows_kernel(lanes: int, code_bytes: int) -> Callable[..., None]:
    add_products = _add_products(lanes, code_bytes)

    @compiled
    def work(
        first: int,
        last: int,
        codes: np.ndarray,
        codewords: np.ndarray,
        values: np.ndarray,
        scales: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        """Write the products of some tiles of eight rows; the last tile overlaps the one before it."""
        registers = np.empty((_ROWS, lanes), np.float32)
        for tile in range(first, last):
            start = min(tile * _ROWS, codes.shape[1] - _ROWS)
            for token in range(len(values)):
                add_products(codes[:, start : start + _ROWS], codewords, values[token], registers)
                for row in range(_ROWS):
                    total = np.float32(0)
                    for lane in range(lanes):
                        total += registers[row, lane]
                    sums[token, start + row] = total * scales[start + row]

    return work


@no_type_check
def _add_products(lanes: int, code_bytes: int) -> Any:
    """Return a function for Numba's code: (codes, codewords, inputs, registers), which writes the last."""

    @intrinsic
    def add_products(context, codes, codewords, inputs, registers):
        def generate(target, builder, signature, arguments):
            arrays = [
                target.make_array(kind)(target, builder, value=value)
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            stride = builder.extract_value(arrays[0].strides, 0)
            count = builder.extract_value(arrays[0].shape, 0)
            _write_loop(builder, [array.data for array in arrays], stride, count, (lanes, code_bytes))
            return target.get_dummy_value()

        return numba.void(codes, codewords, inputs, registers), generate

    return add_products


@no_type_check
def _write_loop(builder, pointers, stride, count, widths: tuple[int, int]) -> None:
    """Write the loop over the groups; it carries the sums of eight rows."""
    lanes, code_bytes = widths
    floats, code = ir.VectorType(ir.FloatType(), lanes), ir.IntType(8 * code_bytes)
    codes, codewords, inputs, registers = pointers
    multiply_add = get_or_insert_function(
        builder.module, ir.FunctionType(floats, [floats] * 3), f"llvm.fma.v{lanes}f32"
    )

    def load(pointer, number):
        place = builder.gep(pointer, [builder.mul(number, _INDEX(lanes))])
        return builder.load(builder.bitcast(place, floats.as_pointer()), align=4)

    before, loop, after = builder.block, builder.append_basic_block("groups"), builder.append_basic_block("after")
    first = builder.ptrtoint(codes, _INDEX)
    builder.branch(loop)
    builder.position_at_end(loop)
    number, sums = builder.phi(_INDEX), [builder.phi(floats) for _ in range(_ROWS)]
    column = builder.inttoptr(builder.add(first, builder.mul(number, stride)), code.as_pointer())
    group = load(inputs, number)
    following = []
    for row in range(_ROWS):
        chosen = builder.zext(builder.load(builder.gep(column, [_INDEX(row)]), align=code_bytes), _INDEX)
        following.append(builder.call(multiply_add, [load(codewords, chosen), group, sums[row]]))
    after_number = builder.add(number, _INDEX(1))
    carried = [(number, _INDEX(0), after_number)]
    carried += [(phi, floats([0.0] * lanes), value) for phi, value in zip(sums, following, strict=True)]
    for phi, at_first, later in carried:
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    builder.cbranch(builder.icmp_unsigned("<", after_number, count), loop, after)
    builder.position_at_end(after)
    places = builder.bitcast(registers, floats.as_pointer())
    for row, value in enumerate(following):
        builder.store(value, builder.gep(places, [_INDEX(row)]), align=4)
