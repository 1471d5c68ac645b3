"""Multiply by a vector-quantized weight without holding it as a whole.

With codewords c, `y_i = r2_i sum_g c[code_ig] . (r1 x)_g` over the groups g of `d` consecutive inputs. The input scale
goes to the activations, the output scale to the result, so that what is left of the weight are codewords alone:

- one token on a CPU: `c[k] . (r1 x)_g` is computed for every codeword and group, block by block, and looked up
  (:mod:`nowag_pl.functional.vq_numba`);
- some tokens: rows are decoded a few hundred at a time, while they fit into the cache;
- CUDA: :mod:`nowag_pl.functional.vq_triton`.

Many tokens take the reconstructed weight: :func:`is_for_few_tokens`.
"""

import logging
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from math import ceil

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from nowag_pl.functional.packing import code_bits, unpack

CPU_MAX_TOKENS = 64  # faster beyond, too (benchmarks/README.md), but what is measured there stays exact
CUDA_MAX_TOKENS = 256  # an estimate, never measured; the same command measures it
TILE_BYTES = 4 * 2**20  # decoded rows at a time
MAX_LOOKUP_RATIO = 4  # codewords per row of the weight, above which computing all products costs more than it saves

_log = logging.getLogger(__name__)


def is_for_few_tokens(num_tokens: int, device: torch.device) -> bool:
    """Tell whether :func:`vq_matmul` is to be used instead of the reconstructed weight.

    Args:
        num_tokens: rows of the activations.
        device: where they are.
    """
    if device.type == "cuda":
        return num_tokens <= CUDA_MAX_TOKENS and has_module("triton")
    return num_tokens <= CPU_MAX_TOKENS


def vq_matmul(
    activations: Float[Tensor, "*batch in"],
    codes: UInt8[Tensor, "bytes"],
    codebook: Float[Tensor, "k d"],
    in_scale: Float[Tensor, "in"],
    out_scale: Float[Tensor, "out"],
) -> Float[Tensor, "*batch out"]:
    """Multiply activations by the transposed weight that codes, codebook and scales stand for. Gives no gradients.

    Args:
        activations: any number of tokens, float32, bfloat16 or float16.
        codes: codes of `ceil(in / d)` codewords for each of `out` rows, packed to `ceil(log2(k))` bits.
        codebook: codewords.
        in_scale: r1.
        out_scale: r2.

    Returns:
        The product in the type of the activations.
    """
    tokens = activations.reshape(-1, activations.shape[-1])  # [tokens, in]
    if tokens.is_cuda and has_module("triton"):
        from nowag_pl.functional.vq_triton import fused_matmul

        output = fused_matmul(tokens, codes, codebook, in_scale, out_scale)
    elif len(tokens) == 1 and _has_lookups(tokens, codebook, out_scale):
        output = _by_lookup(tokens, codes, codebook, in_scale, out_scale)
    else:
        output = _by_tiles(tokens, codes, codebook, in_scale, out_scale)
    return output.view(*activations.shape[:-1], len(out_scale))


@lru_cache
def has_module(name: str) -> bool:
    """Tell whether a package that makes this faster is installed; if not, say once how to get it."""
    found = find_spec(name) is not None
    if not found:
        extra = "pip install triton" if name == "triton" else "pip install 'nowag_pl[cpu]'"
        _log.warning("%s is not installed: vector-quantized linears run more slowly (%s)", name, extra)
    return found


def _has_lookups(tokens: Tensor, codebook: Tensor, out_scale: Tensor) -> bool:
    size = len(codebook)
    return tokens.device.type == "cpu" and 1 < size <= MAX_LOOKUP_RATIO * len(out_scale) and has_module("numba")


def _by_lookup(token: Tensor, codes: Tensor, codebook: Tensor, in_scale: Tensor, out_scale: Tensor) -> Tensor:
    """Multiply one token `[1, in]`, in float32."""
    from nowag_pl.functional.vq_numba import sum_lookups

    groups = _grouped(token[0] * in_scale, codebook.shape[1])
    sums = sum_lookups(codes, codebook.float(), groups.float(), len(out_scale))
    return (sums * out_scale)[None].to(token.dtype)


def _by_tiles(tokens: Tensor, codes: Tensor, codebook: Tensor, in_scale: Tensor, out_scale: Tensor) -> Tensor:
    """Decode and multiply some rows at a time; in bfloat16 if the tokens are, or else in float32."""
    dtype = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
    groups = _grouped(tokens * in_scale, codebook.shape[1]).to(dtype)  # [tokens, groups, d]
    inputs, codewords = groups.flatten(1), codebook.to(dtype).contiguous()
    tiles = _decoded(codes, codewords, len(out_scale), groups.shape[1])
    return (torch.cat([inputs @ tile.T for tile in tiles], dim=1) * out_scale).to(tokens.dtype)


def _grouped(values: Tensor, dim: int) -> Tensor:
    """Cut `[..., in]` into `[..., groups, d]`, padded with zeros."""
    return F.pad(values, (0, -values.shape[-1] % dim)).unflatten(-1, (-1, dim))


def _decoded(codes: Tensor, codebook: Tensor, num_rows: int, num_groups: int) -> Iterator[Tensor]:
    """Yield tiles `[rows, groups * d]` of the normalised weight; the next one overwrites the last one.

    The last columns may be padding.
    """
    bits = code_bits(len(codebook))
    num_tile_rows = max(TILE_BYTES // (num_groups * codebook[0].nbytes) // 8, 1) * 8  # a tile starts with a whole byte
    buffer = codebook.new_empty(min(num_tile_rows, num_rows) * num_groups, codebook.shape[1])
    for start in range(0, num_rows, num_tile_rows):
        first, stop = start * num_groups, min(start + num_tile_rows, num_rows) * num_groups
        tile = buffer[: stop - first]
        if codes.device.type == "cpu" and bits and has_module("numba"):
            from nowag_pl.functional.vq_numba import decode

            decode(codes, codebook, first, tile)
        else:
            part = unpack(codes[first * bits // 8 : ceil(stop * bits / 8)], bits, stop - first)
            torch.index_select(codebook, 0, part, out=tile)
        yield tile.view(-1, num_groups * codebook.shape[1])
