"""Files that a user means by a path: itself, all of a folder, or those that a pattern matches."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nowag_pl.data.documents import is_saved

# Kinds of files among which `load_dataset` takes the most frequent one of a folder.
_KINDS = {".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow"}


def named_files(paths: str | Sequence[str]) -> tuple[str, ...]:
    """Return the files that paths name, those of each path in the order of their names.

    Args:
        paths: one or several, each a file, a dataset that `save_to_disk` wrote, another folder, of which every file is
            meant, also those of its folders, or a pattern of :mod:`glob`, in which `**` matches any number of folders.
            Hidden files are left out of folders and patterns.

    Returns:
        Files and saved datasets; a path that names nothing stays as it is, to be refused where it is read.

    Raises:
        ValueError: a folder holds no files, or a pattern matches none.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str) else paths:
        found += _named(path)
    return tuple(found)


def _named(path: str) -> list[str]:
    place = Path(path).expanduser()
    if place.is_dir() and not is_saved(place):
        files = [str(file) for file in visible_files(place)]
        if not files:
            raise ValueError(f"Expected {place} to be a file, a folder of files or a saved dataset, but it is empty.")
        return files
    if place.exists() or not glob.has_magic(path):
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
    files = [str(match) for match in matches if match.is_file() or is_saved(match)]
    if not files:
        raise ValueError(f"Expected a pattern that matches files, but got {path!r}, which matches none.")
    return files


def visible_files(folder: Path) -> list[Path]:
    """Return all files of a folder and of its folders, in the order of their names, without hidden ones."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def is_folder_of_texts(path: Path) -> bool:
    """Tell whether `load_dataset` would read a folder as plain texts, by the most frequent kind of its files."""
    if not path.is_dir():
        return False
    kinds = Counter(file.suffix for file in visible_files(path) if file.suffix in _KINDS)
    return bool(kinds) and kinds.most_common(1)[0][0] == ".txt"
