"""Continuations of a few prompts by the dense and the compressed model, for people to read beside the figures."""

from typing import Any

import psutil
import torch
from torch import nn

from nowag_pl.models.assembly import assemble
from nowag_pl.models.generation import continuations, unpacked
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import PromptSettings

# Times the size of the dense model, with room for the cache of keys and values: the compressed model and its unpacked
# copy in host memory, and one of both on a GPU.
_HOST_ROOM, _DEVICE_ROOM = 2.5, 1.3


def fits_whole(run: CompressionRun) -> bool:
    """Tell whether the whole dense or compressed model fits in the memory that is free now.

    Args:
        run: gives the model and its device.
    """
    size = run.num_parameters * run.checkpoint.dtype.itemsize
    if run.device.type == "cuda" and _DEVICE_ROOM * size > torch.cuda.mem_get_info(run.device)[0]:
        return False
    return _HOST_ROOM * size < psutil.virtual_memory().available


def written_by(run: CompressionRun, compressed: nn.Module | None, settings: PromptSettings) -> list[str]:
    """Return the continuation of each prompt.

    Args:
        run: gives the dense model, its tokenizer and the device.
        compressed: the whole compressed model, which stays as it is; None: the dense model writes.
        settings: prompts, and the length of the continuations.
    """
    checkpoint = run.checkpoint
    model: Any = assemble(checkpoint, {}) if compressed is None else unpacked(checkpoint, compressed)
    model.to(run.device)
    return continuations(model, checkpoint.tokenizer, settings.prompts, settings.max_new_tokens)
