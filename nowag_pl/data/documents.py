"""Documents out of local files, by their suffix, out of datasets saved to disk, and out of a dataset's rows."""

import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from nowag_pl.data.chats import Document, document_of, text_columns
from nowag_pl.data.tables import SUFFIXES, decoded, open_bytes, read_table, table_kind

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_log = logging.getLogger(__name__)
SHUFFLE_BUFFER = 10_000  # documents of a stream among which the next one is drawn


def read_text_file(path: str | Path) -> str:
    """Read one UTF-8 text file, which may be compressed as .gz.

    Raises:
        ValueError: the file is missing, not readable, or not UTF-8 text.
    """
    path = Path(path)
    try:
        with open_bytes(path) as file:
            return decoded(file.read())
    except (OSError, EOFError, zlib.error, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Expected {path} to be a readable UTF-8 text file, but got: {reason}.") from error


def read_documents(path: str | Path, column: str | None = None) -> list[Document]:
    """Read a local file or a dataset saved to disk.

    Args:
        path: a table (.json, .jsonl, .ndjson, .parquet, .csv, .tsv; rows are documents), any other UTF-8 text file (one
            document), each of them also as .gz, or a folder that `save_to_disk` wrote.
        column: column of a table that holds texts or chats. None: see :func:`nowag_pl.data.chats.text_columns`.

    Returns:
        Texts, and chats as lists of messages.

    Raises:
        ValueError: the file is missing, damaged, empty or of a kind that is not read, it has no such column, or the
            folder holds several splits or no dataset.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return rows_to_documents(open_saved(path, None), column, str(path))
    kind = table_kind(path)
    if kind is None:
        return [_read_other_file(path)]
    if not path.is_file():
        raise ValueError(f"Expected {path} to be a readable file, but there is none.")
    _log.info("Reading %s", path)
    try:
        rows = read_table(path, column)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if f"{path} to have a column" in str(error):
            raise
        # Libraries add lines of their own.
        raise ValueError(
            f"Expected {path} to be a readable {kind} file with rows, but got: {first_line(error)}."
        ) from error
    return [document_of(row, list(row), str(path), index) for index, row in enumerate(rows)]


def _read_other_file(path: Path) -> str:
    try:
        return read_text_file(path)
    except ValueError as error:
        if not path.is_file() or path.suffix in {"", ".txt", ".text", ".md"}:
            raise
        raise ValueError(
            f"{error} Files of rows are known by their suffix: {', '.join(SUFFIXES)}, or these .gz."
        ) from error


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path, split: str | None) -> "Dataset":
    """Open a dataset that `save_to_disk` wrote.

    Args:
        folder: the folder.
        split: name of one of its splits. None if there is only one.

    Raises:
        ValueError: there is no such dataset or split, or it has several splits and none is named.
    """
    from datasets import DatasetDict, load_from_disk

    if not is_saved(folder):
        raise ValueError(
            f"Expected a file or a dataset that save_to_disk wrote, but {folder} is another folder. Name its files."
        )
    try:
        opened = load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"Could not read the saved dataset in {folder}: {first_line(error)}.") from error
    is_dict = isinstance(opened, DatasetDict)
    splits = dict(opened) if is_dict else {str(opened.split or "train"): opened}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split == "train" and not is_dict:
        return opened  # "train" is the default, so it may mean a dataset without splits
    if split in splits:
        return splits[split]
    wanted = "one split" if split is None else f"split {split!r}"
    raise ValueError(
        f"Expected {wanted} in the saved dataset {folder}, but got {sorted(splits)}. Name one: path and split in "
        "data.calibration_dataset or data.eval_datasets."
    )


def rows_to_documents(
    rows: "Dataset | IterableDataset",
    column: str | None,
    name: str,
    max_documents: int | None = None,
    shuffle_seed: int | None = None,
) -> list[Document]:
    """Read the texts or chats of a dataset's rows.

    Args:
        rows: the dataset, which may be a stream: of it only as many rows are read as needed.
        column: column that holds them. None: see :func:`nowag_pl.data.chats.text_columns`.
        name: name of the dataset in messages.
        max_documents: number of rows to read. None: all.
        shuffle_seed: draw rows at random; from a stream, among the next 10,000. None: in order.

    Raises:
        ValueError: there are no rows, they have no such column, or it holds something else.
    """
    from datasets import Dataset

    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"Expected {name} to hold documents, but it is empty.")
    columns = text_columns(list(first), column, name)
    rows = rows.select_columns(list(columns))
    if isinstance(rows, Dataset):
        rows = rows if shuffle_seed is None else rows.shuffle(seed=shuffle_seed)
        rows = rows.select(range(min(max_documents or len(rows), len(rows))))
    else:
        rows = rows if shuffle_seed is None else rows.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        rows = rows if max_documents is None else rows.take(max_documents)
    return [document_of(row, columns, name, index) for index, row in enumerate(rows)]


def first_line(error: BaseException) -> str:
    """Return the beginning of another library's error text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".: ")
