"""Imports go down and never in a circle, also not inside of functions; an undefined name does not pass the checks."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("nowag_pl", "callbacks")
    for file in (ROOT / folder).rglob("*.py")
}


def imported(file: Path) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, in functions as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in FILES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            inner = {f"{node.module}.{name.name}" for name in node.names}
            yield from inner & FILES.keys()
            if inner - FILES.keys():
                yield node.module


def test_no_circle_even_by_a_lazy_import():
    graph = {module: set(imported(file)) - {module} for module, file in FILES.items()}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_kernels_import_nothing_of_ours_but_kernels():
    kernels = {module: file for module, file in FILES.items() if module.startswith("nowag_pl.kernels")}
    assert len(kernels) > 8
    for module, file in kernels.items():
        assert all(each.startswith("nowag_pl.kernels") for each in imported(file)), module


@pytest.mark.parametrize("module", ["compressors/nowag.py", "functional/normalization.py"])
def test_an_undefined_name_is_caught_by_ruff_and_mypy(module, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "nowag_pl" / module
    planted.parent.mkdir(parents=True)
    planted.write_text(
        (ROOT / "nowag_pl" / module).read_text() + "\n\ndef _planted() -> int:\n    return not_defined\n"
    )
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", planted]
    mypy = [sys.executable, "-m", "mypy", "--follow-imports=skip", "--cache-dir", tmp_path / "cache", planted]
    for command, found in ((ruff, "F821 Undefined name `not_defined`"), (mypy, 'Name "not_defined" is not defined')):
        checked = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert checked.returncode == 1
        assert found in checked.stdout
