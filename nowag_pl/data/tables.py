"""Rows of local tables: JSON, CSV, TSV and Parquet. Only the columns that are needed are looked at.

The other columns may hold anything, of another type in every row; so the types of a column are never guessed.
"""

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nowag_pl.data.chats import Row, text_columns

_KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
SUFFIXES = tuple(_KINDS)
_MOST_BLOCK = 2**31 - 1  # bytes of a row, as pyarrow counts them


def table_kind(path: str | Path) -> str | None:
    """Return the kind of table that a file of this suffix is; None for plain text.

    >>> table_kind("a.jsonl.gz"), table_kind("b.parquet"), table_kind("c.tsv"), table_kind("d.txt")
    ('json', 'parquet', 'csv', None)
    """
    return _KINDS.get(_suffix(path))


def _suffix(path: str | Path) -> str:
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, unpacked if its name ends in .gz."""
    file: Any = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # noqa: SIM115 - the caller closes it
    return file


def decoded(content: bytes) -> str:
    """Return UTF-8 text with line ends as Python's own, whatever they are in the file.

    Raises:
        ValueError: it is something else; the message names the first byte that is wrong, and its offset.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The bytes that mark the encoding do not count in the offset.
        start = error.start + len(content) - len(error.object)
        raise ValueError(
            f"byte 0x{content[start]:02x} at offset {start}, which is no UTF-8; convert the file to UTF-8 first"
        ) from error
    return io.StringIO(text, newline=None).read()


def read_table(path: Path, column: str | None) -> list[Row]:
    """Read the columns of a table that hold its text.

    Args:
        path: a file for which :func:`table_kind` gives a kind.
        column: column that holds texts or chats. None: see :func:`nowag_pl.data.chats.text_columns`.

    Returns:
        Each row with these columns alone.

    Raises:
        ValueError: the file is damaged, empty, or has no such column.
    """
    readers = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}
    kind = table_kind(path)
    assert kind is not None
    with open_bytes(path) as file:
        rows = readers[kind](file.read(), column, path)
    if not rows:
        raise ValueError("no rows")
    return rows


def _read_json(content: bytes, column: str | None, path: Path) -> list[Row]:
    """Read rows of JSON: one a line, or all in one list."""
    rows = _json_rows(decoded(content))
    first = next(rows, None)
    if first is None:
        return []
    columns = text_columns(list(first), column, str(path))
    chosen = [{name: first[name] for name in columns}]
    for number, row in enumerate(rows, start=1):
        text_columns([name for name in columns if name in row], columns[0], f"row {number} of {path}")
        chosen.append({name: row.get(name) for name in columns})
    return chosen


def _json_rows(text: str) -> Iterator[dict[str, Any]]:
    start = text.lstrip()[:1]
    if start == "[" or not (start and _is_json(text.lstrip().partition("\n")[0])):
        content = json.loads(text) if start else []
        numbered: Iterator[tuple[int, Any]] = enumerate(content if isinstance(content, list) else [content])
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n")) if line.strip())
        numbered = ((number, _parsed(number, line)) for number, line in lines)
    for number, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__} in place of row {number}, an object with columns")
        yield row


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parsed(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number + 1} is no JSON: {error}") from error


def _read_csv(content: bytes, column: str | None, path: Path) -> list[Row]:
    from pyarrow import BufferReader, csv, string

    decoded(content)
    parse = csv.ParseOptions(delimiter="\t" if _suffix(path) == ".tsv" else ",", newlines_in_values=True)
    # A row has to lie in one block.
    read = csv.ReadOptions(block_size=min(len(content) + 1, _MOST_BLOCK))
    with csv.open_csv(BufferReader(content), read, parse) as opened:
        columns = text_columns(opened.schema.names, column, str(path))
    convert = csv.ConvertOptions(
        include_columns=list(columns), column_types=dict.fromkeys(columns, string()), strings_can_be_null=False
    )
    return csv.read_csv(BufferReader(content), read, parse, convert).to_pylist()


def _read_parquet(content: bytes, column: str | None, path: Path) -> list[Row]:
    from pyarrow import BufferReader
    from pyarrow.parquet import ParquetFile

    with ParquetFile(BufferReader(content)) as file:
        columns = text_columns(file.schema_arrow.names, column, str(path))
        return file.read(columns=list(columns)).to_pylist()
