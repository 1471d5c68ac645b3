"""Where to cut many scores so that a given number of them is kept, without sorting them."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nowag_pl.functional import chunks
from nowag_pl.kernels.cpu.threads import in_threads

# From so many values on, a sample is drawn.
MIN_SAMPLED = 2**19
SAMPLE_SIZE = 2**16
# Ranks in the sample: at least four standard deviations.
SAMPLE_MARGIN = 512


def mark_largest(values: Float[Tensor, " n"], num_removed: int, keep: Bool[Tensor, " n"]) -> bool:
    """Write the mask of the largest of many values on a CPU, reading them once.

    A sample gives two bounds of the threshold. Only values between them are examined again.

    Args:
        values: float32.
        num_removed: 1 to n - 1.
        keep: where the mask goes.

    Returns:
        Whether it was written: not for few values, on another device, where too many values are equal, or in the rare
        case that the sample misleads.
    """
    if values.device.type != "cpu" or len(values) < MIN_SAMPLED:
        return False
    array, mask = values.numpy(), keep.numpy()
    # An odd step meets all columns of a matrix.
    sample = np.sort(array[:: len(array) // SAMPLE_SIZE | 1])
    rank = num_removed * len(sample) // len(array)
    low, high = sample[max(rank - SAMPLE_MARGIN, 0)], sample[min(rank + SAMPLE_MARGIN, len(sample) - 1)]

    def share(first: int, last: int) -> tuple[int, np.ndarray] | None:
        """Mark entries above the higher value; return their number, and the places of those between both if few."""
        places, num_above = [], 0
        for start in range(first, last, SAMPLE_SIZE):
            part = slice(start, min(start + SAMPLE_SIZE, last))
            np.greater(array[part], high, out=mask[part])
            num_above += int(np.count_nonzero(mask[part]))
            places.append(start + np.flatnonzero((array[part] >= low) ^ mask[part]))
            # An index takes 8 bytes: more of them would take more memory than the values.
            if sum(len(found) for found in places) > (last - first) // 8:
                return None
        return num_above, np.concatenate(places)

    shares = in_threads(share, 0, len(array))
    parts = [part for part in shares if part is not None]
    if len(parts) < len(shares):
        return False
    between = np.concatenate([places for _, places in parts])
    num_missing = len(array) - num_removed - sum(num_above for num_above, _ in parts)
    if not 0 < num_missing <= len(between):
        return False
    candidates = array[between]
    threshold = np.partition(candidates, -num_missing)[-num_missing]
    above = candidates > threshold
    mask[between[above]] = True
    mask[between[candidates == threshold][: num_missing - np.count_nonzero(above)]] = True
    return True


def kth_smallest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """Return the k-th smallest of many values, counted from 1, without sorting or copying them.

    The bits of floating-point numbers are in the order of the numbers: how often each value of their upper 16 bits
    occurs tells those of the k-th smallest, and then the same of the lower 16 bits.

    Args:
        values: float32, none NaN.
        k: 1 to n.

    Example:
        >>> import torch
        >>> kth_smallest(torch.tensor([3.0, -1.0, 2.0]), k=2).item()
        2.0
    """
    parts = values.split(chunks.CHUNK_ELEMENTS)
    upper, k = _locate([torch.bincount(_order(part) >> 16, minlength=2**16) for part in parts], k)
    lower, _ = _locate([torch.bincount(_lower_bits(part, upper), minlength=2**16) for part in parts], k)
    bits = (upper << 16 | lower) - 2**31
    bits = bits if bits >= 0 else bits ^ 0x7FFFFFFF
    return torch.tensor(bits, dtype=torch.int32, device=values.device).view(torch.float32)


def _order(values: Tensor) -> Tensor:
    """Return integers in [0, 2^32) in the order of float32 values."""
    bits = values.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + 2**31


def _lower_bits(values: Tensor, upper: int) -> Tensor:
    """Return the lower bits of those values whose upper bits are given."""
    order = _order(values)
    return order[order >> 16 == upper] & 0xFFFF


def _locate(counts: list[Tensor], k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th value of all counts together, and which of that bin's values it is."""
    cumulative = torch.stack(counts).sum(dim=0).cumsum(dim=0)
    index = int((cumulative < k).sum())
    return index, k - (int(cumulative[index - 1]) if index else 0)
