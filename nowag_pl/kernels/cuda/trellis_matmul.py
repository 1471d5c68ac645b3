"""Numbers of packed tiles on CUDA: written out as a matrix, or multiplied by a few tokens while they are cut out.

Only the packed words come from the memory of the device. The number of a state is read from a table, which stays in the
second cache (256 KiB); products with the code `mul1` compute it instead. Triton comes with the CUDA builds of PyTorch;
with TRITON_INTERPRET=1 the kernels run on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int16
from torch import Tensor

_TILE = 16
# Smallest side that tl.dot takes.
_MIN_DOT = 16
# Tokens of one program at the most, its outputs, and the inputs of a step.
_TOKENS, _OUTPUTS, _INPUTS = 64, 32, 64


def decode(
    packed: Int16[Tensor, "in_tiles out_tiles words"], values: Float[Tensor, " states"], bits: int
) -> Float[Tensor, "padded_out padded_in"]:
    """Return the numbers of all tiles as a matrix, float32.

    Args:
        packed: circular streams.
        values: number of every state.
        bits: k.
    """
    words = _words(packed)
    outputs, inputs = _TILE * packed.shape[1], _TILE * packed.shape[0]
    numbers = torch.empty(outputs, inputs, device=packed.device)
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(inputs, _INPUTS))
    with torch.cuda.device_of(packed):  # Triton launches on the current device
        _decode[grid](
            words,
            values.float().contiguous(),
            numbers,
            outputs,
            inputs,
            BITS=bits,
            STATE_BITS=(len(values) - 1).bit_length(),
            COMPUTED=False,
            OUTPUTS=_OUTPUTS,
            INPUTS=_INPUTS,
            enable_fp_fusion=True,  # multiply and add in one instruction
        )
    return numbers


def multiply(
    tokens: Float[Tensor, "tokens padded_in"],
    packed: Int16[Tensor, "in_tiles out_tiles words"],
    values: Float[Tensor, " states"],
    bits: int,
    computed: bool,
) -> Float[Tensor, "tokens padded_out"]:
    """Multiply tokens by the transposed matrix of :func:`decode`.

    Args:
        tokens: activations, float32.
        packed: circular streams.
        values: number of every state.
        bits: k.
        computed: whether the numbers are those of the code `mul1`, which are computed.
    """
    num_tokens, inputs = tokens.shape
    outputs = _TILE * packed.shape[1]
    result = tokens.new_empty(num_tokens, outputs)
    block = 1 if num_tokens == 1 else min(max(triton.next_power_of_2(num_tokens), _MIN_DOT), _TOKENS)
    with torch.cuda.device_of(tokens):
        _multiply[(triton.cdiv(outputs, _OUTPUTS), triton.cdiv(num_tokens, block))](
            tokens.contiguous(),
            _words(packed),
            values.float().contiguous(),
            result,
            num_tokens,
            outputs,
            inputs,
            BITS=bits,
            STATE_BITS=(len(values) - 1).bit_length(),
            COMPUTED=computed,
            TOKENS=block,
            OUTPUTS=_OUTPUTS,
            INPUTS=_INPUTS,
            enable_fp_fusion=True,  # multiply and add in one instruction
        )
    return result


def _words(packed: Tensor) -> Tensor:
    """Return streams in 32-bit words."""
    return packed.contiguous().view(torch.int32)


@triton.jit
@no_type_check  # Triton compiles the plain function
def _numbers(
    words_ptr,  # int32 [in_tiles, out_tiles, 8 k]
    values_ptr,  # [2^L]
    rows,  # outputs
    columns,  # inputs
    num_outputs,
    inside,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
):
    """Return the numbers at some places of the matrix, float32; 0 outside of it."""
    row, column = rows % 16, columns % 16
    # The lane of a warp and the place in it that hold a weight; inputs are the rows of a tile.
    lane = 4 * (row % 8) + (column % 8) // 2
    step = 8 * lane + column % 2 + 2 * (column // 8) + 4 * (row // 8)
    end = (step + 1) * BITS
    word = (end - 1) // 32
    before = tl.where(word == 0, 8 * BITS - 1, word - 1)
    tile = ((columns // 16).to(tl.int64) * (num_outputs // 16) + rows // 16) * (8 * BITS)
    high = tl.load(words_ptr + tile + before, mask=inside, other=0).to(tl.int64)
    low = tl.load(words_ptr + tile + word, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    state = (((high << 32) | low) >> (32 * (word + 1) - end).to(tl.int64)) & ((1 << STATE_BITS) - 1)
    if COMPUTED:
        mixed = (state * 0x83DCD12D) & 0xFFFFFFFF
        total = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + (mixed >> 24)
        # Product and sum are exact in float32, so that only the last step rounds.
        scaled = (1024 + total).to(tl.float32) * 0.00676727294921875 - 10.3828125
        numbers = scaled.to(tl.float16).to(tl.float32)
    else:
        numbers = tl.load(values_ptr + state, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return tl.where(inside, numbers, 0.0)


@triton.jit
@no_type_check
def _decode(
    words_ptr,
    values_ptr,
    numbers_ptr,  # [outputs, inputs]
    num_outputs,
    num_inputs,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    rows = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[:, None]
    columns = (tl.program_id(1) * INPUTS + tl.arange(0, INPUTS))[None, :]
    inside = (rows < num_outputs) & (columns < num_inputs)
    numbers = _numbers(words_ptr, values_ptr, rows, columns, num_outputs, inside, BITS, STATE_BITS, COMPUTED)
    tl.store(numbers_ptr + rows.to(tl.int64) * num_inputs + columns, numbers, mask=inside)


@triton.jit
@no_type_check
def _multiply(
    tokens_ptr,  # [tokens, inputs]
    words_ptr,
    values_ptr,
    result_ptr,  # [tokens, outputs]
    num_tokens,
    num_outputs,
    num_inputs,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    COMPUTED: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(0, num_inputs, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        inside = (inputs < num_inputs)[:, None] & (outputs < num_outputs)[None, :]
        # [inputs, outputs]
        numbers = _numbers(
            words_ptr, values_ptr, outputs[None, :], inputs[:, None], num_outputs, inside, BITS, STATE_BITS, COMPUTED
        )
        known = (tokens < num_tokens)[:, None] & (inputs < num_inputs)[None, :]
        activations = tl.load(
            tokens_ptr + tokens.to(tl.int64)[:, None] * num_inputs + inputs[None, :], mask=known, other=0.0
        )
        if TOKENS == 1:
            total += tl.sum(tl.reshape(activations, (INPUTS, 1)) * numbers, axis=0)[None, :]
        else:
            # The numbers are exact in 11 bits of mantissa.
            total = tl.dot(activations, numbers, total)
    places = result_ptr + tokens.to(tl.int64)[:, None] * num_outputs + outputs[None, :]
    tl.store(places, total, mask=(tokens < num_tokens)[:, None] & (outputs < num_outputs)[None, :])
