"""The nearest codeword of many points on a CPU, compiled by Numba when it is first used.

A product `[w, w x] . [c^2, -2 c]` of a handful of columns costs a matrix multiplication little more than writing its
result down, and searching the result for the minima of its rows costs as much again. Here a few points meet a few
registers of codewords at a time, and the smallest distances so far stay in registers too, so that no distance is
written. Numba does not vectorise such a loop by itself: its instructions are given in LLVM's terms.

A distance is summed in the order of the columns, each with one rounding (a fused multiply-add), as MKL does: the codes
are those of :func:`nowag_pl.functional.vq.nearest.row_minima` of the product, on any number of threads.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from llvmlite import ir
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from torch import Tensor

from nowag_pl.kernels.cpu.threads import in_threads

# Codewords in a register of AVX-512; elsewhere several registers stand for one.
_LANES = 16
# Points and registers of codewords that meet at a time.
_POINTS, _REGISTERS = 4, 2
_WORD, _INDEX = ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(_WORD, _LANES)


def codeword_registers(codeword_features: Float[Tensor, "width k"]) -> Float[Tensor, "registers width lanes"]:
    """Return the right side of the product as :func:`find_nearest` reads it, padded with codewords never nearest.

    Args:
        codeword_features: c^2 and -2 c, as columns.
    """
    padding = -codeword_features.shape[1] % (_LANES * _REGISTERS)
    padded = torch.nn.functional.pad(codeword_features, (0, padding), value=torch.nan)
    return padded.unflatten(1, (-1, _LANES)).transpose(0, 1).contiguous()


def find_nearest(
    features: Float[Tensor, "n width"],
    registers: Float[Tensor, "registers width lanes"],
    codes: Int[Tensor, " n"],
    distances: Float[Tensor, " n"],
) -> None:
    """Write the codeword with the smallest product for each point; of equal ones, the first.

    Args:
        features: w and w x of each point.
        registers: from :func:`codeword_registers`.
        codes: where the codewords go, int32.
        distances: where their products go.
    """
    assign = _assign_kernel(features.shape[1])
    arrays = [tensor.numpy() for tensor in (features, registers, codes, distances)]
    in_threads(lambda first, last: assign(first, last, *arrays), 0, len(features))


@lru_cache
@no_type_check
def _assign_kernel(width: int) -> Callable[..., None]:
    scan = _scan(width)

    @numba.njit(nogil=True)
    def assign(
        first: int, last: int, features: np.ndarray, registers: np.ndarray, codes: np.ndarray, distances: np.ndarray
    ) -> None:
        """Write codes and distances of some points: the minima of the lanes, then of all of them."""
        tile = np.zeros((_POINTS, width), np.float32)
        minima, indices = np.empty((_POINTS, _LANES), np.float32), np.empty((_POINTS, _LANES), np.int32)
        for start in range(first, last, _POINTS):
            size = min(_POINTS, last - start)
            for point in range(size):
                for column in range(width):
                    tile[point, column] = features[start + point, column]
            scan(tile, registers, minima, indices)
            for point in range(size):
                nearest, code = minima[point, 0], indices[point, 0]
                for lane in range(1, _LANES):
                    distance, index = minima[point, lane], indices[point, lane]
                    if distance < nearest or (distance == nearest and index < code):
                        nearest, code = distance, index
                distances[start + point], codes[start + point] = nearest, code

    return assign


@no_type_check
def _scan(width: int) -> Any:
    """Return a function for Numba's code: (tile, registers, minima, indices), which writes the last two."""

    @intrinsic
    def scan(context, tile, registers, minima, indices):
        def generate(target, builder, signature, arguments):
            arrays = [
                target.make_array(kind)(target, builder, value=value).data
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            shape = target.make_array(registers)(target, builder, value=arguments[1]).shape
            _write_scan(builder, *arrays, builder.extract_value(shape, 0), width)
            return target.get_dummy_value()

        return numba.void(tile, registers, minima, indices), generate

    return scan


@no_type_check
def _write_scan(builder, tile, registers, minima, indices, num_registers, width: int) -> None:
    """Write the loop over all registers of codewords; it carries each lane's minimum and its index."""
    registers = builder.bitcast(registers, _FLOATS.as_pointer())
    before, loop = builder.block, builder.append_basic_block("registers")
    builder.branch(loop)
    builder.position_at_end(loop)
    number = builder.phi(_INDEX)
    nearest, index = ([builder.phi(kind) for _ in range(_POINTS)] for kind in (_FLOATS, _WORDS))
    smallest, where = list(nearest), list(index)
    products = _write_products(builder, tile, registers, number, width)
    for register in range(_REGISTERS):
        first = builder.mul(builder.add(number, _INDEX(register)), _INDEX(_LANES))
        lanes = builder.add(_spread(builder, builder.trunc(first, _WORD)), _WORDS(list(range(_LANES))))
        for point in range(_POINTS):
            product = products[point][register]
            is_less = builder.fcmp_ordered("<", product, smallest[point])
            smallest[point] = builder.select(is_less, product, smallest[point])
            where[point] = builder.select(is_less, lanes, where[point])
    following = builder.add(number, _INDEX(_REGISTERS))
    carried = [(number, _INDEX(0), following)]
    carried += [(phi, _FLOATS([np.inf] * _LANES), value) for phi, value in zip(nearest, smallest, strict=True)]
    carried += [(phi, _WORDS([0] * _LANES), value) for phi, value in zip(index, where, strict=True)]
    for phi, at_first, later in carried:
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    after = builder.append_basic_block("after")
    builder.cbranch(builder.icmp_unsigned("<", following, num_registers), loop, after)
    builder.position_at_end(after)
    for array, values, kind in ((minima, smallest, _FLOATS), (indices, where, _WORDS)):
        rows = builder.bitcast(array, kind.as_pointer())
        for point, value in enumerate(values):
            builder.store(value, builder.gep(rows, [_INDEX(point)]), align=4)


@no_type_check
def _write_products(builder, tile, registers, number, width: int) -> list[list[Any]]:
    """Write the products of all points of the tile with some registers; return them as `[points][registers]`."""
    multiply_add = get_or_insert_function(
        builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{_LANES}f32"
    )
    products = [[_FLOATS([0.0] * _LANES)] * _REGISTERS for _ in range(_POINTS)]
    for column in range(width):
        places = [builder.add(number, _INDEX(register)) for register in range(_REGISTERS)]
        places = [builder.add(builder.mul(place, _INDEX(width)), _INDEX(column)) for place in places]
        codewords = [builder.load(builder.gep(registers, [place]), align=4) for place in places]
        for point in range(_POINTS):
            value = builder.load(builder.gep(tile, [_INDEX(point * width + column)]))
            feature = _spread(builder, value)
            products[point] = [
                builder.call(multiply_add, [feature, codeword, product])
                for codeword, product in zip(codewords, products[point], strict=True)
            ]
    return products


@no_type_check
def _spread(builder, value) -> Any:
    """Return a register with the value in each lane."""
    undefined = ir.Constant(ir.VectorType(value.type, _LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, _WORD(0))
    return builder.shuffle_vector(first, undefined, _WORDS([0] * _LANES))
