"""The source of a module's model: its checkpoint, or the compressed model of a run."""

from pathlib import Path

import torch
from torch import nn

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.format.saving import is_compressed, load_compressed
from nowag_pl.stages.compression_run import CompressedModel, CompressionRun
from nowag_pl.stages.plan import Plan


def begin_run(
    checkpoint: Checkpoint, run_dir: str | Path | None, random_init: bool, plan: Plan, device: torch.device
) -> CompressionRun:
    """Return the stages over a dense checkpoint.

    Args:
        checkpoint: dense model.
        run_dir: folder of the artefacts.
        random_init: whether the model has random weights instead.
        plan: the stages of the run.
        device: device of the computations.

    Raises:
        ValueError: there is no run directory, or no dense model to compress.
    """
    if run_dir is None:
        raise ValueError("Expected a run_dir for the artefacts of a compression, but got none.")
    if random_init or is_compressed(checkpoint.folder):
        state = "has random weights" if random_init else "is compressed already"
        raise ValueError(
            f"Expected a dense model to compress, but {checkpoint.path} {state}. Set compression.enabled to false to "
            "train or measure it unchanged."
        )
    return CompressionRun(checkpoint, run_dir, plan, device)


def build_whole(
    checkpoint: Checkpoint, compressed: CompressedModel | None, random_init: bool, verify: bool
) -> nn.Module:
    """Return the whole model in host memory.

    Args:
        checkpoint: dense or compressed model.
        compressed: the result of a run, which is preferred to the checkpoint; None if there is none.
        random_init: start from random weights instead of the checkpoint's.
        verify: compare the files of a compressed checkpoint with their checksums.
    """
    if compressed is not None:
        return compressed.assemble()
    if random_init:
        return checkpoint.build()
    if is_compressed(checkpoint.folder):
        return load_compressed(checkpoint.folder, checkpoint.dtype, verify, packed=True)
    return checkpoint.load()
