"""A text that comes with every Python: the language reference and the docstrings, read at run time.

Documents are the topics of :mod:`pydoc_data.topics` and, for every module of a package, its docstrings. They are
read from source files, so nothing is imported or executed. One document in ten, chosen by the hash of its
name, is held out for evaluation; the choice does not change between machines.
"""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

STANDARD_LIBRARY = "stdlib"
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_MIN_CHARACTERS = 200  # shorter documents are stubs


def python_docs(split: Literal["train", "eval"], packages: Sequence[str] = (STANDARD_LIBRARY,)) -> Iterator[str]:
    """Yield documents in a fixed order.

    Args:
        split: "eval" for the held-out tenth, "train" for the rest.
        packages: names of installed packages; "stdlib" stands for the standard library and the topics.

    Raises:
        ValueError: a package is not installed.
    """
    seen: set[bytes] = set()  # some docstrings are in dozens of modules: the first keeps it, whatever its split
    for package in packages:
        for name, document in _documents(package):
            paragraphs = []
            for docstring in document:
                digest = hashlib.sha256(docstring.encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    paragraphs.append(docstring)
            text = "\n\n".join(paragraphs)
            held_out = hashlib.sha256(name.encode()).digest()[0] < 26  # 26 of 256
            if held_out == (split == "eval") and len(text) >= _MIN_CHARACTERS:
                yield text


def _documents(package: str) -> Iterator[tuple[str, list[str]]]:
    """Yield (name, docstrings) for the topics and modules of a package."""
    if package == STANDARD_LIBRARY:
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", [text]) for name, text in sorted(topics.items()))
    yield from ((f"{package} {name}", _docstrings(path)) for name, path in _sources(package))


def docs_state(packages: Sequence[str] = (STANDARD_LIBRARY,)) -> str:
    """Return what changes with the documents: a hash of sizes and times of all source files, which are not read.

    Args:
        packages: names of installed packages.

    Raises:
        ValueError: a package is not installed.
    """
    digest = hashlib.sha256(f"{sys.version} {Path(__file__).read_bytes()!r}".encode())
    for package in packages:
        for name, path in _sources(package):
            state = path.stat()
            digest.update(f"{package} {path} {name} {state.st_size} {state.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    """Yield name and file of the modules of a package."""
    root = Path(sysconfig.get_path("stdlib")) if package == STANDARD_LIBRARY else _package_folder(package)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(relative.parts):
            yield relative.as_posix(), path


def _package_folder(package: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ModuleNotFoundError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.submodule_search_locations:
        raise ValueError(f"Expected an installed Python package, but got {package!r}. It must be a folder of modules.")
    return Path(spec.origin).parent


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a source file in their order, or nothing if it does not parse."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's escape sequences
            tree = ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError, OSError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]
