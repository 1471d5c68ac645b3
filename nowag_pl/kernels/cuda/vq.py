"""A fused product with a vector-quantized weight on CUDA: unpack, look up, scale and multiply in one kernel.

Only packed codes come from the memory of the device; the codebook (96 KiB at d = 6, k = 4096) is read over and over
and stays in the cache of a multiprocessor. A program computes some rows of the weight for up to 64 tokens. Triton comes
with the CUDA builds of PyTorch; with TRITON_INTERPRET=1 the kernel runs on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from nowag_pl.kernels.bits import code_bits

# Tokens of one program, at the most.
_TOKENS = 64
# Smallest side that tl.dot takes.
_MIN_DOT = 16
_ROWS, _GROUPS = 16, 32


def fused_matmul(
    tokens: Float[Tensor, "tokens in"],
    codes: UInt8[Tensor, " bytes"],
    codebook: Float[Tensor, "k d"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
) -> Float[Tensor, "tokens out"]:
    """Multiply as :func:`nowag_pl.functional.vq.matmul.vq_matmul` does.

    Args:
        tokens: activations, float32, bfloat16 or float16.
        codes: packed codes.
        codebook: codewords.
        in_scale: r1.
        out_scale: r2.
    """
    num_tokens, in_features = tokens.shape
    output = tokens.new_empty(num_tokens, len(out_scale))
    block_tokens = 1 if num_tokens == 1 else min(max(triton.next_power_of_2(num_tokens), _MIN_DOT), _TOKENS)
    grid = (triton.cdiv(len(out_scale), _ROWS), triton.cdiv(num_tokens, block_tokens))
    # Triton launches on the current device.
    with torch.cuda.device_of(tokens):
        _kernel[grid](
            tokens.contiguous(),
            codes,
            codebook.contiguous(),
            in_scale,
            out_scale,
            output,
            num_tokens,
            in_features,
            len(out_scale),
            len(codes),
            BITS=code_bits(len(codebook)),
            DIM=codebook.shape[1],
            TOKENS=block_tokens,
            ROWS=_ROWS,
            GROUPS=_GROUPS,
            enable_fp_fusion=True,  # multiply and add in one instruction
        )
    return output


@triton.jit
@no_type_check  # Triton compiles the plain function
def _kernel(
    tokens_ptr,  # [tokens, in]
    codes_ptr,  # uint8 [bytes]
    codebook_ptr,  # [k, d]
    in_scale_ptr,  # [in]
    out_scale_ptr,  # [out]
    output_ptr,  # [tokens, out]
    num_tokens,
    in_features,
    out_features,
    num_bytes,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    num_groups = (in_features + DIM - 1) // DIM
    row_bits = rows.to(tl.int64) * num_groups * BITS
    # Sums of one token, added up at the end.
    one = tl.zeros((ROWS, GROUPS), dtype=tl.float32)
    many = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, num_groups, GROUPS):
        groups = start + tl.arange(0, GROUPS)
        inside = (rows < out_features)[:, None] & (groups < num_groups)[None, :]
        bit = row_bits[:, None] + (groups * BITS)[None, :]
        word = tl.zeros((ROWS, GROUPS), dtype=tl.int32)
        # A code may start at any of the 8 bits of its first byte.
        for byte in tl.static_range((BITS + 14) // 8):
            index = (bit >> 3) + byte
            value = tl.load(codes_ptr + index, mask=inside & (index < num_bytes), other=0)
            word |= value.to(tl.int32) << (8 * byte)
        code = (word >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1)
        for column in tl.static_range(DIM):
            inputs = groups * DIM + column
            real = inputs < in_features
            codeword = tl.load(codebook_ptr + code * DIM + column, mask=inside, other=0, eviction_policy="evict_last")
            in_scale = tl.load(in_scale_ptr + inputs, mask=real, other=0).to(tl.float32)
            weight = codeword.to(tl.float32) * in_scale[None, :]  # [rows, groups]
            if TOKENS == 1:
                token = tl.load(tokens_ptr + inputs, mask=real, other=0).to(tl.float32)
                one += weight * token[None, :]
            else:
                offsets = tokens.to(tl.int64)[:, None] * in_features + inputs[None, :]
                token = tl.load(tokens_ptr + offsets, mask=(tokens < num_tokens)[:, None] & real[None, :], other=0)
                many = tl.dot(token, tl.trans(weight.to(token.dtype)), many, input_precision="ieee")
    out_scale = tl.load(out_scale_ptr + rows, mask=rows < out_features, other=0).to(tl.float32)
    sums = tl.sum(one, axis=1)[None, :] if TOKENS == 1 else many
    offsets = tokens.to(tl.int64)[:, None] * out_features + rows[None, :]
    mask = (tokens < num_tokens)[:, None] & (rows < out_features)[None, :]
    tl.store(output_ptr + offsets, (sums * out_scale[None, :]).to(output_ptr.dtype.element_ty), mask=mask)
