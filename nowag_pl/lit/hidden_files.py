"""Hidden states between blocks while they are finetuned, in files, so that a killed run goes on at its block.

A file holds the hidden states of all sequences at one place: `prefix_003` those that the compressed and finetuned
blocks before block 3 give, `dense_003` those of the dense model there, `targets_003` the outputs of the dense block for
the former.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.stages import finetuned as finetuning
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import FinetuningSettings


class HiddenFiles:
    """Inputs and targets of the blocks.

    Args:
        run: a run whose linears are compressed.
        windows: token ids of all sequences `[num_sequences, seq_len]`, the same on every rank.
        settings: which targets, and where hidden states are while they are used.
    """

    def __init__(self, run: CompressionRun, windows: Tensor, settings: FinetuningSettings) -> None:
        self._model, self._store, self._ranks = run.model, run.store, run.store.ranks
        self._windows = windows
        self._of_model = settings.targets == "model"
        self._batch_size = max(settings.batch_size // self._ranks.world_size, 1)
        self._entry = (windows.shape[1], self._model.hidden_size), run.checkpoint.dtype
        in_memory = settings.activations == "memory"
        self._arrays = ArrayFolder(self._store.folder / finetuning.STAGE / "hidden", self._ranks, in_memory)

    @property
    def num_bytes(self) -> int:
        """Size of one file of all ranks together."""
        (seq_len, hidden_size), dtype = self._entry
        return len(self._windows) * seq_len * hidden_size * dtype.itemsize

    def begin(self, missing: Collection[int]) -> int:
        """Return the last block from which all that are missing can be reached; its inputs are there then."""
        start = next((index for index in range(min(missing), 0, -1) if self._has_inputs(index)), 0)
        if start == 0 and not self._has_inputs(0):
            for stream in self._streams:
                self._write(f"{stream}_000", lambda rows: self._model.embed(self._windows[rows]).hidden)
        return start

    def inputs(self, index: int) -> SequenceArray:
        """Return the hidden states before a block that :meth:`begin` or :meth:`advance` has reached."""
        return self._read(f"prefix_{index:03d}")

    def targets(self, index: int, inputs: SequenceArray) -> SequenceArray:
        """Return the outputs that a block is trained towards, computing them where they are not there."""
        return self._read(self._write_targets(index, inputs))

    def advance(self, index: int, inputs: SequenceArray) -> None:
        """Write the inputs of the next block, and delete those of this one."""
        block = finetuning.load_finetuned_block(self._model, self._store, index).to(self._model.device)
        self._write(f"prefix_{index + 1:03d}", lambda rows: self.forward(block, index, inputs.take(rows.tolist())))
        if self._of_model:
            # The block may have been there already, and its targets not.
            self._write_targets(index, inputs)
        if self._ranks.is_zero:
            for name in (*(f"{stream}_{index:03d}" for stream in self._streams), f"targets_{index:03d}"):
                self._arrays.remove(name)

    def clear(self) -> None:
        """Delete everything, on rank zero."""
        if self._ranks.is_zero:
            self._arrays.clear()

    def forward(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Return the outputs of a block `[batch, seq_len, hidden]`, on the device, for such hidden states."""
        hidden = hidden.to(self._model.device)
        return self._model.forward_block(block, hidden, self._model.arguments(index, *hidden.shape[:2]))

    @property
    def _streams(self) -> list[str]:
        return ["prefix", "dense"] if self._of_model else ["prefix"]

    def _has_inputs(self, index: int) -> bool:
        return all(f"{stream}_{index:03d}" in self._arrays for stream in self._streams)

    def _read(self, name: str) -> SequenceArray:
        return self._arrays.read(name, self._entry[1])

    def _write_targets(self, index: int, inputs: SequenceArray) -> str:
        """Write the dense block's outputs, if they are not there; return the name of their file."""
        name = f"dense_{index + 1:03d}" if self._of_model else f"targets_{index:03d}"
        if name not in self._arrays:
            source = self._read(f"dense_{index:03d}") if self._of_model else inputs
            dense = self._model.load_block(index)
            self._write(name, lambda rows: self.forward(dense, index, source.take(rows.tolist())))
        return name

    @torch.no_grad()
    def _write(self, name: str, compute: Callable[[Tensor], Tensor]) -> None:
        """Write this rank's share of a file, if it is not there; `compute` makes the entries of some sequences."""
        if name in self._arrays:
            return
        rows = torch.arange(len(self._windows))[self._ranks.rank :: self._ranks.world_size]
        batches = ((compute(part).cpu(),) for part in (rows.split(self._batch_size) if len(rows) else ()))
        self._arrays.write({name: self._entry}, len(self._windows), batches)
