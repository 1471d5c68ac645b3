"""The dense model's predictions on the evaluation texts, kept as the hidden states behind its last block.

Hidden states are a small fraction of the logits' size; the head turns them into logits when they are needed.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.files import read_tensors, write_tensors
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.pipeline.progress import block_progress
from nowag_pl.pipeline.store import ArtefactStore
from nowag_pl.pipeline.stream import HiddenStream


class DenseReference:
    """Dense logits by evaluation text and window.

    Args:
        model: dense model.
        store: run directory.
        windows: name of each evaluation text to its windows `[num_windows, seq_len]`; this rank takes its share.
        batch_size: windows that pass a block together.
    """

    def __init__(
        self, model: StreamedModel, store: ArtefactStore, windows: Mapping[str, Tensor], batch_size: int
    ) -> None:
        self._model = model
        self._ranks = store.ranks
        files = {name: self._file(store.folder, tokens) for name, tokens in windows.items()}
        absent = [name for name, file in files.items() if not file.is_file()]
        absent = [name for name in windows if any(name in names for names in self._ranks.gather(absent))]
        for name in absent:
            write_tensors(files[name], {"hidden": self._record(name, windows[name], batch_size)})
        self._hidden = {name: read_tensors(file)[0]["hidden"] for name, file in files.items()}

    def _file(self, folder: Path, tokens: Tensor) -> Path:
        share = f"{self._ranks.rank}_of_{self._ranks.world_size}"
        return folder / "reference" / f"{tokens_digest(tokens)[:16]}_{tokens.shape[1]}_{share}.safetensors"

    def _record(self, name: str, windows: Tensor, batch_size: int) -> Tensor:
        """Return the hidden states of this rank's windows behind the last block, `[num, seq_len, hidden]`."""
        stream = HiddenStream(self._model, self._ranks.share(windows), batch_size)
        with block_progress(f"Dense model on {name}", len(self._model), self._ranks.is_zero) as report:
            for index in range(len(self._model)):
                stream.run(self._model.load_block(index), index)
                report("")
        return stream.gathered()

    def logits(self, name: str, indices: Tensor) -> Tensor:
        """Return the dense logits of some windows of this rank.

        Args:
            name: evaluation text.
            indices: numbers of the windows `[batch]`.

        Returns:
            `[batch, seq_len, vocabulary]`.
        """
        places = torch.div(indices.cpu() - self._ranks.rank, self._ranks.world_size, rounding_mode="floor")
        return self._model.head(self._hidden[name][places])
