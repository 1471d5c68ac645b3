"""Inputs and targets of blocks while they are finetuned, in files, so that a killed run continues at its block.

A file holds the hidden states of all sequences at one place: `prefix_003` those that the compressed and finetuned
blocks before block 3 give, `dense_003` those of the dense model there, `targets_003` the outputs of the dense block for
the former.
"""

from collections.abc import Collection

from torch import Tensor, nn

from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.run.layout import HIDDEN
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.finetuned import load_finetuned_block
from nowag_pl.stages.hidden import HiddenFiles, forward
from nowag_pl.stages.plan import FinetuningSettings


class BlockInputs:
    """Inputs and targets of the blocks.

    Args:
        run: a run whose linears are compressed.
        windows: token ids of all sequences `[num_sequences, seq_len]`, the same on every rank.
        settings: the targets, and the place of hidden states while they are used.
    """

    def __init__(self, run: CompressionRun, windows: Tensor, settings: FinetuningSettings) -> None:
        self._model, self._store = run.model, run.store
        self._of_model = settings.targets == "model"
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
        self._files.run(f"prefix_{index + 1:03d}", block, index, inputs)
        if self._of_model:
            # The block may have been there already, and its targets not.
            self._write_targets(index, inputs)
        self._files.remove(*(f"{stream}_{index:03d}" for stream in self._streams), f"targets_{index:03d}")

    def clear(self) -> None:
        """Delete everything, on rank zero."""
        self._files.clear()

    def forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the outputs of a block `[batch, seq_len, hidden]`, on the device, for such hidden states."""
        return forward(self._model, block, index, hidden)

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
            self._files.run(name, self._model.load_block(index), index, source)
        return name
