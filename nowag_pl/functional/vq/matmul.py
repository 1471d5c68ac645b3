"""Multiply by a vector-quantized weight without holding it as a whole.

With codewords c, `y_i = r2_i sum_g c[code_ig] . (r1 x)_g` over the groups g of `d` consecutive inputs. The input scale
goes to the activations, the output scale to the result, so that only codewords are left of the weight:

- one token on a CPU: `c[k] . (r1 x)_g` is computed for every codeword and group, block by block, and looked up
  (:mod:`nowag_pl.kernels.cpu.vq`);
- some tokens: rows are decoded a few hundred at a time, while they fit into the cache;
- a few tokens on a CPU, from codes stored by columns: as for one token, or codeword by codeword
  (:mod:`nowag_pl.kernels.cpu.vq_rows`), whichever suits the number of rows (:func:`columns_matmul`);
- CUDA: :mod:`nowag_pl.kernels.cuda.vq`.

Many tokens take the reconstructed weight: :func:`is_for_few_tokens`.
"""

from collections.abc import Callable
from functools import partial
from math import ceil

import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor
from torch.nn.functional import pad

from nowag_pl.functional.storage.packing import unpack
from nowag_pl.functional.vq.quantized import grouped
from nowag_pl.kernels.bits import code_bits
from nowag_pl.kernels.dispatch import is_for_numba, is_for_triton

# It is faster beyond that, too (benchmarks/README.md), but perplexities are measured with the exact weight.
CPU_MAX_TOKENS = 64
# Tokens that are looked up from columns (measured, benchmarks/README.md).
CPU_MAX_LOOKUP_TOKENS = 4
# An estimate that was never measured; the same command measures it.
CUDA_MAX_TOKENS = 256
# Size of the rows that are decoded at a time.
TILE_BYTES = 4 * 2**20
# Rows below which a register of eight is never full.
MIN_ROWS = 8
# Weights of a codeword that fit a register.
MAX_LANES = 16
# Weights of the codebook for each row of the weight, up to which products with all codewords are faster than codewords
# one by one; with 4096 codewords of 6 weights that is from 2458 rows on.
MAX_PRODUCTS_PER_ROW = 10
# Codewords per row of the weight, above which computing all products costs more than it saves.
MAX_LOOKUP_RATIO = 4

# Takes the codebook, the number of the first row, and the tensor to write to.
_Decode = Callable[[Tensor, int, Tensor], None]


def is_for_few_tokens(num_tokens: int, device: torch.device) -> bool:
    """Tell whether :func:`vq_matmul` is to be used instead of the reconstructed weight.

    Args:
        num_tokens: rows of the activations.
        device: device of the tensors.
    """
    if device.type == "cuda":
        return num_tokens <= CUDA_MAX_TOKENS and is_for_triton(device)
    return num_tokens <= CPU_MAX_TOKENS


def vq_matmul(
    activations: Float[Tensor, "*batch in"],
    codes: UInt8[Tensor, " bytes"],
    codebook: Float[Tensor, "k d"],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
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
    if is_for_triton(tokens.device):
        from nowag_pl.kernels.cuda.vq import fused_matmul

        output = fused_matmul(tokens, codes, codebook, in_scale, out_scale)
    elif len(tokens) == 1 and reason_against_lookup(len(codebook), len(out_scale), tokens.device) is None:
        output = _by_lookup(tokens, codes, codebook, in_scale, out_scale)
    else:
        output = _by_tiles(tokens, codebook, in_scale, out_scale, partial(_decode, codes))
    return output.view(*activations.shape[:-1], len(out_scale))


def code_columns(codes: Int[Tensor, "out groups"], num_codewords: int) -> Integer[Tensor, "groups out"]:
    """Return codes column by column, in one byte each for up to 256 codewords, in two for up to 65,536, else in four.

    Args:
        codes: codeword of each subvector.
        num_codewords: size of the codebook.

    Example:
        >>> import torch
        >>> code_columns(torch.tensor([[1, 2, 3]]), 256).shape
        torch.Size([3, 1])
    """
    bits = code_bits(num_codewords)
    dtype = torch.uint8 if bits <= 8 else torch.uint16 if bits <= 16 else torch.int32
    return codes.to(dtype).T.contiguous()


def codeword_table(codebook: Float[Tensor, "k d"], num_rows: int) -> Float[Tensor, "..."]:
    """Return the codewords in the form in which :func:`columns_matmul` is fastest for a weight of so many rows.

    With many rows, that is `[chunks, d, n]`: a group's products with all codewords pay off, as all rows look them up.
    With few rows it is `[k, lanes]`, codewords padded to a power of two.

    Args:
        codebook: codewords.
        num_rows: rows of the weight.

    Example:
        >>> import torch
        >>> codeword_table(torch.ones(4096, 6), 576).shape, codeword_table(torch.ones(4096, 6), 4096).shape
        (torch.Size([4096, 8]), torch.Size([8, 6, 512]))
    """
    size, dim = codebook.shape
    if num_rows < MIN_ROWS or dim > MAX_LANES or size * dim <= MAX_PRODUCTS_PER_ROW * num_rows:
        from nowag_pl.kernels.cpu.vq import codeword_chunks

        return codeword_chunks(codebook.float())
    return pad(codebook.detach().float(), (0, _lanes(dim) - dim)).contiguous()


def codewords_of(table: Float[Tensor, "..."], size: int, dim: int) -> Float[Tensor, "k d"]:
    """Return the codebook of a table.

    Args:
        table: result of :func:`codeword_table`.
        size: number of codewords k.
        dim: weights d of each.
    """
    return table[:, :dim] if table.ndim == 2 else table.transpose(1, 2).reshape(-1, dim)[:size]


def columns_matmul(
    activations: Float[Tensor, "*batch in"],
    columns: Integer[Tensor, "groups out"],
    table: Float[Tensor, "..."],
    codebook_shape: tuple[int, int],
    in_scale: Float[Tensor, " in"],
    out_scale: Float[Tensor, " out"],
) -> Float[Tensor, "*batch out"]:
    """Return the result of :func:`vq_matmul`, on a CPU with Numba.

    Args:
        activations: any number of tokens, float32, bfloat16 or float16.
        columns: result of :func:`code_columns`.
        table: result of :func:`codeword_table`.
        codebook_shape: number k and length d of the codewords.
        in_scale: r1.
        out_scale: r2.

    Returns:
        The product in the type of the activations.
    """
    size, dim = codebook_shape
    tokens = activations.reshape(-1, activations.shape[-1])  # [tokens, in]
    if len(tokens) > CPU_MAX_LOOKUP_TOKENS:
        from nowag_pl.kernels.cpu.vq_columns import decode_columns

        codebook = codewords_of(table, size, dim).contiguous()
        output = _by_tiles(tokens, codebook, in_scale, out_scale, partial(decode_columns, columns))
        return output.view(*activations.shape[:-1], len(out_scale))
    # Small linears take less time than a few calls of PyTorch: everything else is in the kernels.
    tokens, scales = tokens.detach().float(), (in_scale.detach(), out_scale.detach())
    if table.ndim == 2:
        from nowag_pl.kernels.cpu.vq_rows import multiply_rows

        output = multiply_rows(tokens, columns, table, dim, *scales)
    else:
        from nowag_pl.kernels.cpu.vq_columns import multiply_columns

        output = multiply_columns(tokens, columns, table, *scales)
    return output.to(activations.dtype).view(*activations.shape[:-1], len(out_scale))


def reason_against_columns(num_codewords: int, device: torch.device) -> str | None:
    """Return why :func:`columns_matmul` cannot be used, or None if it can.

    Args:
        num_codewords: size of the codebook.
        device: where the weight is.

    Example:
        >>> import torch
        >>> reason_against_columns(1, torch.device("cpu"))
        'a single codeword'
    """
    if device.type != "cpu":
        return f"on {device.type}, not on a CPU"
    if num_codewords == 1:
        return "a single codeword"
    return None if is_for_numba(device, num_codewords, "codes") else "Numba is not installed"


def reason_against_lookup(num_codewords: int, num_rows: int, device: torch.device) -> str | None:
    """Return why products with a weight are not looked up (:mod:`nowag_pl.kernels.cpu.vq`), or None if they are.

    Args:
        num_codewords: size of the codebook.
        num_rows: rows of the weight.
        device: where the weight is.

    Example:
        >>> import torch
        >>> reason_against_lookup(4096, 64, torch.device("cpu"))
        'more than 4 codewords a row'
    """
    if device.type != "cpu":
        return f"on {device.type}, not on a CPU"
    if not 1 < num_codewords <= MAX_LOOKUP_RATIO * num_rows:
        return f"more than {MAX_LOOKUP_RATIO} codewords a row" if num_codewords > 1 else "a single codeword"
    return None if is_for_numba(device, num_rows, "codes") else "Numba is not installed"


def _lanes(dim: int) -> int:
    """Return the next power of two, and at least 2."""
    return max(1 << (dim - 1).bit_length(), 2)


def _by_lookup(token: Tensor, codes: Tensor, codebook: Tensor, in_scale: Tensor, out_scale: Tensor) -> Tensor:
    """Multiply one token `[1, in]`, in float32."""
    from nowag_pl.kernels.cpu.vq import sum_lookups

    groups = grouped(token[0] * in_scale, codebook.shape[1])
    sums = sum_lookups(codes, codebook.float(), groups.float(), len(out_scale))
    return (sums * out_scale)[None].to(token.dtype)


def _by_tiles(tokens: Tensor, codebook: Tensor, in_scale: Tensor, out_scale: Tensor, decoded: _Decode) -> Tensor:
    """Decode and multiply some rows at a time; in bfloat16 if the tokens are, or else in float32."""
    dtype = torch.bfloat16 if tokens.dtype == torch.bfloat16 else torch.float32
    groups = grouped(tokens * in_scale, codebook.shape[1]).to(dtype)  # [tokens, groups, d]
    inputs, codewords = groups.flatten(1), codebook.to(dtype).contiguous()
    num_rows, num_groups = len(out_scale), groups.shape[1]
    # A tile starts with a whole byte.
    num_tile_rows = max(TILE_BYTES // (num_groups * codewords[0].nbytes) // 8, 1) * 8
    buffer = inputs.new_empty(min(num_tile_rows, num_rows), inputs.shape[1])
    products = []
    for start in range(0, num_rows, num_tile_rows):
        tile = buffer[: min(num_tile_rows, num_rows - start)]
        decoded(codewords, start, tile)
        products.append(inputs @ tile.T)
    return (torch.cat(products, dim=1) * out_scale).to(tokens.dtype)


def _decode(codes: Tensor, codebook: Tensor, start: int, tile: Tensor) -> None:
    """Write rows from `start` on, a multiple of 8, of the normalised weight; the last columns may be padding."""
    subvectors = tile.view(-1, codebook.shape[1])
    num_groups, bits = len(subvectors) // len(tile), code_bits(len(codebook))
    first, stop = start * num_groups, start * num_groups + len(subvectors)
    if bits and is_for_numba(codes.device, len(subvectors), "codes"):
        from nowag_pl.kernels.cpu.vq import decode

        decode(codes, codebook, first, subvectors)
    else:
        part = unpack(codes[first * bits // 8 : ceil(stop * bits / 8)], bits, len(subvectors))
        torch.index_select(codebook, 0, part, out=subvectors)
