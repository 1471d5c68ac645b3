"""The artefacts of a run: one file per stage and block."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nowag_pl.files import read_metadata, read_tensors, write_tensors
from nowag_pl.run import manifest
from nowag_pl.run.layout import artefact
from nowag_pl.run.ranks import Ranks


class ArtefactStore:
    """A run directory.

    Only rank zero looks and writes; every rank gets its answer, so that a slow file system cannot make them differ.

    Args:
        folder: the run directory; it is created when something is written.
        ranks: the processes of the run.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks

    def path(self, stage: str, index: int) -> Path:
        """Return the file of a stage and block."""
        return artefact(self.folder, stage, index)

    def missing(self, stage: str, num_blocks: int) -> list[int]:
        """Return the blocks for which a stage has not been done."""
        absent = [index for index in range(num_blocks) if not self.path(stage, index).is_file()]
        return self.ranks.broadcast(absent)

    def write(self, stage: str, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write an artefact, on rank zero, and wait for it on the others."""
        if self.ranks.is_zero:
            write_tensors(self.path(stage, index), tensors, metadata)
        self.ranks.broadcast(None)

    def read(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the metadata of an artefact."""
        return read_tensors(self.path(stage, index))

    def read_metadata(self, stage: str, index: int) -> dict[str, Any]:
        """Return the metadata of an artefact."""
        return read_metadata(self.path(stage, index))

    def remove(self, stage: str) -> None:
        """Delete the artefacts of a stage, on rank zero, when no rank needs them any more."""
        self.ranks.gather(None)
        if self.ranks.is_zero:
            shutil.rmtree(self.folder / stage, ignore_errors=True)

    def claim(self, section: str, settings: Mapping[str, Any], stage: str | None = None) -> None:
        """Enter the settings of a stage in the manifest, or check that they are those of the artefacts.

        Args:
            section: name of the settings, such as "calibration".
            settings: JSON values that the artefacts depend on.
            stage: the stage that makes those artefacts; as long as it has made none, its settings may change.

        Raises:
            ValueError: the run directory holds artefacts made with other settings; the message names them.
            OSError: the run directory cannot be written.
        """
        problem = self.ranks.broadcast(
            manifest.claim(self.folder, section, settings, stage) if self.ranks.is_zero else None
        )
        if problem:
            raise ValueError(problem)
