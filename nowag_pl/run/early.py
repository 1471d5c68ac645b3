"""A changed setting in a run directory, refused before anything large is imported.

The command line is read as far as this is certain: numbers, and the method, that are given in options and configuration
files and stand in the manifest under the same name. Whatever else differs is refused later, by the manifest itself.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nowag_pl.run.layout import COMPRESSED, FINETUNED, MANIFEST, MOMENTS

# Section of the manifest: the folder of what it made, and the group of options that it comes from.
_SECTIONS = {
    "calibration": (MOMENTS, "calibration"),
    "compression": (COMPRESSED, "compression.compressor"),
    "finetuning": (FINETUNED, "finetuning"),
}
_METHOD = "compression.compressor"
_ELSEWHERE = {"--help", "-h", "--print_config"}


def refuse_changed_settings(words: Sequence[str]) -> None:
    """End the process with the manifest's message if a `fit` certainly has other settings than its run directory.

    Args:
        words: arguments of the command line.
    """
    if words[:1] != ["fit"] or any(word.partition("=")[0] in _ELSEWHERE for word in words):
        return
    try:
        problem = changed_setting(words[1:])
    except (OSError, ValueError, yaml.YAMLError):
        # What cannot be read here is told by the program itself.
        return
    if problem and not os.environ.get("NOWAG_PL_TRACEBACK"):
        sys.exit(f"error: {problem}")


def changed_setting(words: Sequence[str]) -> str | None:
    """Return what differs, for a message, or None where nothing certainly does.

    Args:
        words: arguments of `fit`.
    """
    options = read_options(words)
    folder = options.get("run_dir")
    if not isinstance(folder, str) or not Path(folder, MANIFEST).is_file():
        return None
    if options.get("compression.enabled") is False:
        return None
    manifest = json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))
    found = []
    for section, (stage, group) in _SECTIONS.items():
        is_used = section != "finetuning" or options.get("finetuning.enabled") is True
        # As long as a stage has made nothing, its settings may change.
        if is_used and any(Path(folder, stage).glob("block_*.safetensors")):
            differences = _differences(manifest.get(section, {}), options, group)
            found += [f"{section}.{name} = {known!r}, not {given!r}" for name, known, given in differences]
    if not found:
        return None
    return (
        f"Run directory {folder} holds a run with {'; '.join(found)}. Runs are never mixed: choose another run_dir, or "
        "delete this one to start again."
    )


def _differences(known: Mapping[str, Any], options: Mapping[str, Any], group: str) -> list[tuple[str, Any, Any]]:
    """Return name, recorded and given value of numbers that differ, or of the method alone if it is another one."""
    method = options.get(_METHOD)
    if group == _METHOD and isinstance(method, str) and method.rpartition(".")[2] != known.get("compressor"):
        return [("compressor", known.get("compressor"), method.rpartition(".")[2])]
    found = []
    for name, value in known.items():
        given = options.get("data.seq_len" if (group, name) == ("calibration", "seq_len") else f"{group}.{name}")
        if _is_number(value) and _is_number(given) and given != value:
            found.append((name, value, given))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_options(words: Sequence[str]) -> dict[str, Any]:
    """Return options by their full names, with those of configuration files, the last value of each.

    Args:
        words: such as "--config", "a.yaml" or "--data.seq_len=512".
    """
    options: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        name, is_joined, value = waiting.pop(0).partition("=")
        if not name.startswith("--"):
            continue
        if not is_joined:
            value = waiting.pop(0) if waiting else ""
        if name == "--config":
            settings = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            _enter(options, "", settings.get("fit", settings) if isinstance(settings, dict) else {})
        else:
            _enter(options, name.removeprefix("--"), _parsed(value))
    return options


def _parsed(value: str) -> Any:
    """Return a value as YAML has it, and numbers such as 1e-4, which it takes for words."""
    try:
        return float(value) if "e" in value else yaml.safe_load(value)
    except ValueError:
        return yaml.safe_load(value)


def _enter(options: dict[str, Any], name: str, value: Any) -> None:
    """Enter a value, and what is below it, in place of what was there; another class drops the options of the last."""
    name = name.replace(".init_args", "").removesuffix(".class_path")
    if not isinstance(value, dict):
        options[name] = _parsed(value) if isinstance(value, str) else value
        if name == _METHOD:
            for option in [each for each in options if each.startswith(f"{_METHOD}.")]:
                del options[option]
        return
    for key in sorted(value, key=lambda key: key != "class_path"):
        _enter(options, f"{name}.{key}" if name else str(key), value[key])
