"""Bits of packed values, and views in which values of any type are moved."""

import torch

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by their bytes."""


def code_bits(num_codes: int) -> int:
    """Return the bits that hold any of `num_codes` values: `ceil(log2(num_codes))`.

    Example:
        >>> code_bits(4096), code_bits(6), code_bits(1)
        (12, 3, 0)
    """
    return (num_codes - 1).bit_length()
