"""2:4 weights in the form that the sparse tensor cores of NVIDIA GPUs multiply, from Ampere on (torch.sparse)."""

import warnings

import torch
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

PATTERN = (2, 4)
DTYPES = (torch.float16, torch.bfloat16)
# Rows and columns have to be multiples of it; enough for either backend of torch.sparse.
MULTIPLE = 64
MIN_CAPABILITY = (8, 0)


def reason_against_semi_structured(
    shape: tuple[int, int], pattern: tuple[int, int] | None, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why a weight cannot be multiplied in its 2:4 form, or None if it can.

    Args:
        shape: (out, in).
        pattern: (N, M) of the weight; None for an unstructured one.
        dtype: type of the weight.
        device: device of the weight.

    Example:
        >>> import torch
        >>> reason_against_semi_structured((64, 64), (4, 8), torch.float16, torch.device("cuda"))
        'pattern (4, 8) instead of (2, 4)'
    """
    if device.type != "cuda":
        return f"on {device.type}, not on CUDA"
    if pattern != PATTERN:
        return f"pattern {pattern} instead of {PATTERN}"
    if dtype not in DTYPES:
        return f"{dtype} instead of torch.float16 or torch.bfloat16"
    if any(size % MULTIPLE for size in shape):
        return f"shape {shape}, no multiple of {MULTIPLE}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= MIN_CAPABILITY else f"compute capability {capability} under {MIN_CAPABILITY}"


def semi_structured(weight: Tensor) -> Tensor:
    """Return a weight in its 2:4 form, which `torch.nn.functional.linear` takes; it gives no gradients.

    Args:
        weight: `[out, in]` without :func:`reason_against_semi_structured`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype")
        return to_sparse_semi_structured(weight.detach().contiguous())
