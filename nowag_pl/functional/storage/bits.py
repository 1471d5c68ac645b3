"""Exact storage cost of a compressed weight in bits per weight. Biases are not counted: nothing compresses them."""

from math import ceil

from nowag_pl.functional.storage.packing import pattern_bits
from nowag_pl.kernels.bits import code_bits


def masked_bits_per_weight(
    shape: tuple[int, int], num_kept: int, value_bits: int, pattern: tuple[int, int] | None = None
) -> float:
    """Return the cost of kept values and their mask.

    Args:
        shape: (out, in).
        num_kept: weights that are kept.
        value_bits: bits of a kept value (16 for bfloat16).
        pattern: (N, M) if the mask is stored group by group; None for one bit per weight.

    Example:
        >>> masked_bits_per_weight((8, 8), 32, 16), masked_bits_per_weight((8, 8), 32, 16, (2, 4))
        (9.0, 8.75)
    """
    mask_bits = 1.0 if pattern is None else pattern_bits(pattern) / pattern[1]
    return num_kept * value_bits / (shape[0] * shape[1]) + mask_bits


def vector_quantized_bits_per_weight(
    shape: tuple[int, int], subvector_dim: int, codebook_size: int, value_bits: int = 16
) -> float:
    """Return the cost of codes, codebook and both scales.

    Args:
        shape: (out, in). A row that `subvector_dim` does not divide has one more, padded, subvector.
        subvector_dim: weights per codeword.
        codebook_size: number of codewords.
        value_bits: bits of a codebook entry and of a scale.

    Example:
        >>> round(vector_quantized_bits_per_weight((4096, 4096), 6, 4096), 3)  # 2 + codebook and scales
        2.032
    """
    num_codes = shape[0] * ceil(shape[1] / subvector_dim)
    num_values = codebook_size * subvector_dim + sum(shape)
    return (num_codes * code_bits(codebook_size) + num_values * value_bits) / (shape[0] * shape[1])


def armor_bits_per_weight(
    shape: tuple[int, int],
    out_block: int,
    in_block: int,
    pattern: tuple[int, int],
    value_bits: int = 16,
) -> float:
    """Return the cost of an N:M core, its mask, and a block-diagonal factor on either side.

    Args:
        shape: (out, in).
        out_block: size of the blocks `[out / a, a, a]` of the left factor.
        in_block: size of the blocks `[in / b, b, b]` of the right factor.
        pattern: (N, M) of the core.
        value_bits: bits of a value of the core and of a factor.

    Example:
        >>> armor_bits_per_weight((4096, 4096), 128, 128, (2, 4))  # 8.75 for the core
        9.75
    """
    num_kept = shape[0] * shape[1] // pattern[1] * pattern[0]
    num_factors = shape[0] * out_block + shape[1] * in_block
    core_bits = masked_bits_per_weight(shape, num_kept, value_bits, pattern)
    return core_bits + num_factors * value_bits / (shape[0] * shape[1])
