"""Inputs and targets of blocks while they are finetuned, in files, so that a killed run continues at its block.

A file holds the hidden states of all sequences at one place: `prefix_003` those that the compressed and finetuned
blocks before block 3 give, `dense_003` those of the dense model there, `targets_003` the outputs of the dense block for
the former, or those of its attention and its MLP, side by side.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.run.layout import HIDDEN
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.correction import Point, captured
from nowag_pl.stages.finetuned import load_finetuned_block
from nowag_pl.stages.hidden import HiddenFiles, forward
from nowag_pl.stages.plan import FinetuningSettings

ATTENTION, MLP = PARTS = ("self_attn", "mlp")


def outputs_of_parts(model: StreamedModel, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return the outputs of attention and MLP, `[batch, seq_len, 2 hidden]`.

    Args:
        model: runs the block.
        block: the block, dense or compressed.
        hidden: `[batch, seq_len, hidden]`, on the device.
        arguments: the block's other arguments.
    """
    points = [Point(name, "output") for name in PARTS]
    with captured(block, points) as seen:
        model.forward_block(block, hidden, arguments)
    return torch.cat([seen[point] for point in points], dim=-1)


class BlockInputs:
    """Inputs and targets of the blocks.

    Args:
        run: a run whose linears are compressed.
        windows: token ids of all sequences `[num_sequences, seq_len]`, the same on every rank.
        settings: the targets, and the place of hidden states while they are used.
    """

    def __init__(self, run: CompressionRun, windows: Tensor, settings: FinetuningSettings) -> None:
        self._model, self._store = run.model, run.store
        self._of_model, self._of_parts = settings.targets == "model", settings.targets == "parts"
        if self._of_parts and not set(PARTS) <= dict(self._model.blocks[0].named_children()).keys():
            raise ValueError(
                f"Expected, with finetuning.targets=parts, blocks with {ATTENTION} and {MLP}, but those of "
                f"{type(self._model.skeleton).__name__} have others."
            )
        in_memory = settings.activations == "memory"
        arrays = ArrayFolder(self._store.folder / HIDDEN, self._store.ranks, in_memory)
        batch_size = max(settings.batch_size // self._store.ranks.world_size, 1)
        self._files = HiddenFiles(self._model, arrays, windows, batch_size)
        self.num_bytes = windows.numel() * self._model.hidden_size * run.checkpoint.dtype.itemsize  # of one file

    def begin(self, missing: Collection[int]) -> int:
        """Return the last block from which all that are missing can be reached; its inputs are there then."""
        start = next((index for index in range(min(missing), 0, -1) if self._has_inputs(index)), 0)
        if start == 0 and not self._has_inputs(0):
            for stream in self._streams:
                self._files.embed(f"{stream}_000")
        return start

    def inputs(self, index: int) -> SequenceArray:
        """Return the hidden states before a block that :meth:`begin` or :meth:`advance` has reached."""
        return self._files.read(f"prefix_{index:03d}")

    def targets(self, index: int, inputs: SequenceArray) -> SequenceArray:
        """Return the target outputs of a block, computing them if they are not there."""
        return self._files.read(self._write_targets(index, inputs))

    def advance(self, index: int, inputs: SequenceArray) -> None:
        """Write the inputs of the next block, and delete those of this one."""
        block = load_finetuned_block(self._model, self._store, index).to(self._model.device)
        self._files.run(f"prefix_{index + 1:03d}", inputs, lambda hidden: forward(self._model, block, index, hidden))
        if self._of_model:
            # The block may have been there already, and its targets not.
            self._write_targets(index, inputs)
        self._files.remove(*(f"{stream}_{index:03d}" for stream in self._streams), f"targets_{index:03d}")

    def clear(self) -> None:
        """Delete everything, on rank zero."""
        self._files.clear()

    def outputs(self, block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return what is compared with the targets: the outputs of a block, or those of its parts."""
        if self._of_parts:
            return outputs_of_parts(self._model, block, hidden, arguments)
        return self._model.forward_block(block, hidden, arguments)

    def forward(self, block: nn.Module | None, index: int, hidden: Tensor) -> Tensor:
        """Return what is compared with the targets, on the device, for hidden states before a block.

        Args:
            block: the block; None for no block at all: hidden states stay as they are, and parts give nothing.
            index: its number in the model.
            hidden: `[batch, seq_len, hidden]`.
        """
        hidden = hidden.to(self._model.device)
        if block is not None:
            return self.outputs(block, hidden, self._model.arguments(index, *hidden.shape[:2]))
        return torch.zeros_like(hidden).repeat(1, 1, len(PARTS)) if self._of_parts else hidden

    @property
    def _streams(self) -> list[str]:
        return ["prefix", "dense"] if self._of_model else ["prefix"]

    def _has_inputs(self, index: int) -> bool:
        return all(f"{stream}_{index:03d}" in self._files for stream in self._streams)

    def _write_targets(self, index: int, inputs: SequenceArray) -> str:
        """Write the dense block's outputs, if they are not there; return the name of their file."""
        name = f"dense_{index + 1:03d}" if self._of_model else f"targets_{index:03d}"
        if name not in self._files:
            source = self._files.read(f"dense_{index:03d}") if self._of_model else inputs
            block = self._model.load_block(index)
            width = self._model.hidden_size * (len(PARTS) if self._of_parts else 1)
            self._files.run(name, source, lambda hidden: self.forward(block, index, hidden), width)
        return name
