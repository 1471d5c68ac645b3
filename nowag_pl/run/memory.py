"""The most memory that a stage has used."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def measured_memory(peaks: dict[str, int], stage: str, device: torch.device) -> Iterator[None]:
    """Enter the peak memory of a stage when it ends.

    Args:
        peaks: stage to bytes; of the device in this stage, or, where the CPU computes, of the process until its end.
        stage: its name.
        device: where it computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        peaks[stage] = max(peaks.get(stage, 0), peak_memory_bytes(device))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used: of the device since it was last measured, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
