"""The compressed model of a run as its artefacts hold it, of which each process may read some rows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nowag_pl.files import read_rows
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.models.weights import read_headers
from nowag_pl.run.layout import COMPRESSED, FINETUNED
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import compression


class _Place(NamedTuple):
    file: Path
    name: str


class CompressedRows:
    """Tensors in the artefacts of a run: compressed linears, finetuned blocks, and what the dense model has beside.

    Args:
        model: the model that was compressed.
        store: the run directory; its ranks share the work of checking the artefacts.
        is_finetuned: whether blocks are taken as finetuning left them.

    Raises:
        ValueError: an artefact is damaged.
    """

    def __init__(self, model: StreamedModel, store: ArtefactStore, is_finetuned: bool) -> None:
        self._checkpoint: Checkpoint = model.checkpoint
        self.descriptions: dict[str, dict[str, Any]] = {}
        self._places: dict[str, _Place] = {}
        mine = range(store.ranks.rank, len(model), store.ranks.world_size)
        described = store.ranks.gather_work(
            lambda: {index: self._check(store, index, is_finetuned) for index in mine},
        )
        by_block = {index: each for part in described for index, each in part.items()}
        store.ranks.gather_work(lambda: self._checkpoint.check_files(store.ranks.rank, store.ranks.world_size))
        for index in range(len(model)):
            prefix = model.block_name(index)
            self.descriptions |= {f"{prefix}.{name}": each for name, each in by_block[index].items()}
            for stage in (COMPRESSED, FINETUNED) if is_finetuned else (COMPRESSED,):
                file = store.shown(stage, index)
                self._places |= {f"{prefix}.{name}": _Place(file, name) for name in read_headers([file])}

    @staticmethod
    def _check(store: ArtefactStore, index: int, is_finetuned: bool) -> dict[str, dict[str, Any]]:
        """Compare the artefacts of a block with their digests, look at the values, and return the descriptions."""
        for linear in compression.read_block(store, index).values():
            linear.check()
        if is_finetuned:
            store.read_metadata(FINETUNED, index)
        return store.read_metadata(COMPRESSED, index)["linears"]

    def __contains__(self, name: str) -> bool:
        """Tell whether there is a tensor of a name in the model."""
        return name in self._places or name in self._checkpoint

    def read_rows(self, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Read some rows of tensors, by their names in the model, in the type in which they are stored."""
        tensors = self._checkpoint.read_rows({name: part for name, part in rows.items() if name not in self._places})
        places = {name: self._places[name] for name in rows if name in self._places}
        for file in sorted({place.file for place in places.values()}):
            names = {place.name: name for name, place in places.items() if place.file == file}
            found = read_rows(file, {inner: rows[name] for inner, name in names.items()})
            tensors |= {names[inner]: tensor for inner, tensor in found.items()}
        return tensors
