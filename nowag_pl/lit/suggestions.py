"""A command-line parser that suggests the right name after a wrong one."""

import argparse
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from nowag_pl import compressors
from nowag_pl.lit.parser_messages import explained

_CONFIGS = Path("configs")


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description, and begins every text with a capital letter."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        # Docstrings describe arguments as a part of a sentence.
        return text[:1].upper() + text[1:]


class SuggestingParser(LightningArgumentParser):
    """Lightning's parser, with a suggestion after an error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, and with the nearest known names where it speaks of an unknown one."""
        parser = getattr(ex, "subcommand_parser", None) or self
        found = suggestion(message, parser._option_string_actions)
        said = explained(message.partition("\ndid you mean")[0])
        super().error(said + (f"\ndid you mean {found}?" if found else ""), ex)


def suggestion(message: str, options: Iterable[str] = ()) -> str | None:
    """Return the known name that is nearest to the unknown one of an error message, if any is near.

    Args:
        message: of jsonargparse, argparse, or this package.
        options: options of the parser, such as "--data.seq_len".

    Example:
        >>> suggestion("Expected a typing.Literal['dense', 'propagated']. Got value: propagatd")
        'propagated'
    """
    for wrong, known in _unknown(message, [option for option in options if not option.endswith(".help")]):
        by_case = {name.lower(): shown for name, shown in known.items()}
        near = difflib.get_close_matches(wrong.lower(), by_case, n=1, cutoff=0.65)
        if near:
            return by_case[near[0]]
    return None


def _unknown(message: str, options: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each unknown name with the known ones, which map to the text that is shown for them."""
    for option in re.findall(r"(?<![\w-])--[\w.]+", message.partition("unrecognized arguments:")[2]):
        yield option, _same(options)
    for key in re.findall(r"(?:does not accept option|[Kk]ey) '([\w.]+)'", message):
        yield f"--{key}", {option: option.removeprefix("--") for option in options}
    class_path = re.search(r"class_path '([\w.]+)'", message)
    for name in re.findall(r"Option '([\w.]+)' is not accepted", message):
        yield name, _same(_parameters(class_path[1]) if class_path else [])
    for name in re.findall(r"(?:import path string: |class_path ')(?:[\w.]*\.)?(\w+)", message):
        known = {known: f"nowag_pl.{known}" for known in compressors.__all__ if known != "Compressor"}
        # Its options are at fault where the name is known.
        yield from [] if name in known else [(name, known)]
    for file in map(Path, re.findall(r"File does not exist: '?([^'\n]+\.\w+)", message)):
        yield file.stem, _files(file)
    for choices, wrong in re.findall(r"\[([^\]]*)\][.,]? (?:Got value:|but got) '?([\w.-]+)", message):
        yield wrong, _same(re.findall(r"'([^']+)'", choices))
    for wrong, choices in re.findall(r"invalid choice: '?([\w.-]+)'? \(choose from ([^)]*)\)", message):
        yield wrong, _same(re.findall(r"[\w-]+", choices))


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


def _parameters(class_path: str) -> list[str]:
    """Return the names of a class's settings; none if there is no such class."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def _files(missing: Path) -> dict[str, str]:
    """Return the files in the folder of a missing one, and the configurations, by name without ending."""
    files = [*sorted(_CONFIGS.rglob("*.yaml")), *sorted(missing.parent.glob(f"*{missing.suffix}"))]
    here = Path.cwd()
    return {path.stem: str(path.relative_to(here) if path.is_relative_to(here) else path) for path in files}
