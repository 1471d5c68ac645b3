"""The texts of the errors and warnings in the source, read without running it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tiny_models import ROOT

VALUE = "…"  # stands for what a message fills in


@cache
def messages() -> list[str]:
    """Return every string of the package with a value's place marked, those of adjacent literals as one."""
    files = [ROOT / "main.py", *(ROOT / "callbacks").glob("*.py"), *(ROOT / "nowag_pl").rglob("*.py")]
    return [text for file in files for text in _strings(file)]


def _strings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
