"""The artefacts of a run: one file per stage and block."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nowag_pl.files import await_file, check_tensors, read_metadata, read_tensors, set_aside, write_tensors
from nowag_pl.run import lock, manifest
from nowag_pl.run.layout import artefact
from nowag_pl.run.manifest import Claim
from nowag_pl.run.ranks import Ranks

_log = logging.getLogger("nowag_pl")


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
        """Return the blocks for which a stage has not been done, or whose artefact is damaged: it is set aside."""
        mine = range(num_blocks) if self.ranks.is_zero else ()
        return self.ranks.broadcast([index for index in mine if not self._is_whole(self.path(stage, index))])

    def _is_whole(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            check_tensors(path)
        except ValueError:
            lock.acquire(self.folder)
            _log.warning("%s is damaged: it is kept as %s and made anew.", path, set_aside(path).name)
            return False
        return True

    def write(self, stage: str, index: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write an artefact, on rank zero, and wait for it on the others."""
        if self.ranks.is_zero:
            write_tensors(self.path(stage, index), tensors, metadata)
        self.ranks.broadcast(None)

    def read(self, stage: str, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the metadata of an artefact."""
        return read_tensors(self.shown(stage, index))

    def read_metadata(self, stage: str, index: int) -> dict[str, Any]:
        """Return the metadata of an artefact."""
        return read_metadata(self.shown(stage, index))

    def shown(self, stage: str, index: int) -> Path:
        """Return the file of an artefact that was written, perhaps on another machine, when it can be seen here."""
        path = self.path(stage, index)
        if not self.ranks.is_zero:
            await_file(path)
        return path

    def remove(self, stage: str) -> None:
        """Delete the artefacts of a stage, on rank zero, when no rank needs them any more."""
        self.ranks.gather(None)
        if self.ranks.is_zero:
            shutil.rmtree(self.folder / stage, ignore_errors=True)

    def claim(
        self, section: str, settings: Mapping[str, Any], stage: str | None = None, may_rise: tuple[str, ...] = ()
    ) -> None:
        """Become the writer of the run directory, and enter the settings of a stage in its manifest, or check them.

        Args:
            section: name of the settings, such as "calibration".
            settings: JSON values that the artefacts depend on.
            stage: the stage that makes those artefacts; as long as it has made none, its settings may change.
            may_rise: names of settings that may become larger.

        Raises:
            ValueError: the run directory holds artefacts made with other settings, which the message names, or another
                process writes in it.
            OSError: the run directory cannot be written.
        """
        self._enter([Claim(section, settings, stage, may_rise)], write=True)

    def check(self, claims: Iterable[Claim]) -> None:
        """Check that the settings of stages are those of the artefacts that are there; nothing is written.

        Raises:
            ValueError: the run directory holds artefacts made with other settings; the message names them.
        """
        self._enter(claims, write=False)

    def _enter(self, claims: Iterable[Claim], write: bool) -> None:
        problem = None
        if self.ranks.is_zero:
            # What is wrong has to reach the other ranks, which wait for it.
            try:
                if write:
                    lock.acquire(self.folder)
                problem = manifest.enter(self.folder, claims, write)
            except ValueError as error:
                problem = str(error)
        if problem := self.ranks.broadcast(problem):
            raise ValueError(problem)
