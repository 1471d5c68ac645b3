"""The artefacts of a run: one file per stage and block, and the manifest that says what they belong to."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nowag_pl.files import read_json, read_metadata, read_tensors, write_json, write_tensors
from nowag_pl.run.ranks import Ranks

FORMAT = 1
MANIFEST = "manifest.json"
_LAST_STAGES = ("finetuned", "training")  # nothing is made from them: they can be deleted alone


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
        return self.folder / stage / f"block_{index:03d}.safetensors"

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
        problem = self.ranks.broadcast(self._claim(section, dict(settings), stage) if self.ranks.is_zero else None)
        if problem:
            raise ValueError(problem)

    def _claim(self, section: str, settings: dict[str, Any], stage: str | None) -> str | None:
        settings = json.loads(json.dumps(settings))
        for stray in self.folder.rglob(".*.tmp"):  # of a process that was killed
            stray.unlink(missing_ok=True)
        manifest = self._read_manifest()
        if manifest.setdefault("format", FORMAT) != FORMAT:
            return (
                f"Expected a run directory of format {FORMAT}, but {self.folder} has format {manifest['format']}, "
                "of another version of nowag_pl. Choose another run_dir."
            )
        if stage is not None and not any(path.is_file() for path in (self.folder / stage).rglob("*")):
            manifest[section] = settings
        known = manifest.setdefault(section, settings)
        if known != settings:
            differing = [
                name for name in sorted(known.keys() | settings.keys()) if known.get(name) != settings.get(name)
            ]
            both = known.keys() & settings.keys()  # what one of them has alone follows from another method
            differing = [name for name in differing if name in both] or differing
            found = "; ".join(
                f"{section}.{name} = {_short(known.get(name))}, not {_short(settings.get(name))}" for name in differing
            )
            return (
                f"Run directory {self.folder} holds a run with {found}. Runs are never mixed: choose another "
                f"run_dir, or delete {self.folder / stage if stage in _LAST_STAGES and stage else 'this one'} "
                "to start again."
            )
        write_json(self.folder / MANIFEST, manifest)
        return None

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if path.is_file():
            return read_json(path)
        strays = sorted(self.folder.glob("*/block_*.safetensors"))
        if strays:
            raise ValueError(f"Expected {path} beside {strays[0]}, but it is not there. Choose another run_dir.")
        return {}


def _short(value: Any) -> str:
    """Show a setting, and only the beginning of a hash."""
    text = repr(value)
    return f"{text[:9]}...'" if isinstance(value, str) and len(value) == 64 else text
