"""The manifest of a run directory: the settings that its artefacts were made with, so that runs are never mixed."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nowag_pl.files import read_sealed_json, write_sealed_json
from nowag_pl.run.layout import FINETUNED, MANIFEST, TRAINING

FORMAT = 1
_LAST_STAGES = (FINETUNED, TRAINING)  # nothing is made from them: they can be deleted alone


class Claim(NamedTuple):
    """The settings of a stage.

    Attributes:
        section: name of the settings, such as "calibration".
        settings: JSON values that the artefacts depend on.
        stage: folder of the artefacts that the settings make; as long as it is empty, they may change.
        may_rise: names of those that may become larger, as work then goes on: epochs.
    """

    section: str
    settings: Mapping[str, Any]
    stage: str | None = None
    may_rise: tuple[str, ...] = ()


def enter(folder: Path, claims: Iterable[Claim], write: bool) -> str | None:
    """Enter the settings of stages in the manifest, or check that they are those of the artefacts.

    Args:
        folder: run directory.
        claims: the settings.
        write: False only looks.

    Returns:
        None, or what is wrong, for a message.
    """
    manifest = _read(folder)
    before = json.dumps(manifest)
    if manifest.setdefault("format", FORMAT) != FORMAT:
        return (
            f"Expected a run directory of format {FORMAT}, but {folder} has format {manifest['format']}, "
            "of another version of nowag_pl. Choose another run_dir."
        )
    for claim in claims:
        if (problem := _enter(folder, manifest, claim)) is not None:
            return problem
    if write and json.dumps(manifest) != before:
        write_sealed_json(folder / MANIFEST, manifest)
    return None


def _enter(folder: Path, manifest: dict[str, Any], claim: Claim) -> str | None:
    section, stage = claim.section, claim.stage
    settings = json.loads(json.dumps(claim.settings))
    if stage is not None and not any(_is_artefact(path) for path in (folder / stage).rglob("*")):
        manifest[section] = settings
    known = manifest.setdefault(section, settings)
    for name in claim.may_rise:
        if name in known and name in settings and known[name] <= settings[name]:
            known[name] = settings[name]
    if known != settings:
        again = folder / stage if stage in _LAST_STAGES and stage else "this one"
        return (
            f"Run directory {folder} holds a run with {_differences(section, known, settings)}. Runs are never mixed: "
            f"choose another run_dir, or delete {again} to start again."
        )
    return None


def _is_artefact(path: Path) -> bool:
    """Tell whether a file was finished, and is not set aside as damaged."""
    return path.is_file() and not path.name.startswith(".") and ".damaged" not in path.parts[-1]


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.is_file():
        try:
            return read_sealed_json(path, required=False)
        except ValueError as error:
            raise ValueError(f"{error} It holds the settings of the run: choose another run_dir.") from error
    strays = sorted(folder.glob("*/block_*.safetensors"))
    if strays:
        raise ValueError(f"Expected {path} beside {strays[0]}, but it is not there. Choose another run_dir.")
    return {}


def _differences(section: str, known: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name the settings that differ, with both values."""
    names = [name for name in sorted(known.keys() | settings.keys()) if known.get(name) != settings.get(name)]
    # What only one of both has follows from another method, which is named then.
    both = [name for name in names if name in known and name in settings]
    return "; ".join(
        f"{section}.{name} = {_short(known.get(name))}, not {_short(settings.get(name))}" for name in both or names
    )


def _short(value: Any) -> str:
    """Show a setting, and only the beginning of a hash."""
    text = repr(value)
    return f"{text[:9]}...'" if isinstance(value, str) and len(value) == 64 else text
