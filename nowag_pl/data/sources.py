"""Sources of text: local files, Hugging Face datasets, Python's documentation; each a list of documents."""

import dataclasses
import glob
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from nowag_pl.data.chats import Document, text_columns
from nowag_pl.data.documents import (
    first_line,
    is_saved,
    open_saved,
    read_documents,
    read_text_file,
    rows_to_documents,
)
from nowag_pl.data.expansion import is_folder_of_texts
from nowag_pl.data.python_docs import STANDARD_LIBRARY, docs_state, python_docs
from nowag_pl.data.tables import table_kind

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["EvalProtocol", "HubDataset", "LocalFiles", "PythonDocs", "TextSource", "read_text_file"]

_log = logging.getLogger(__name__)
_BUILDERS = {"json", "parquet", "text", "csv", "arrow"}
EvalProtocol = Literal["stream", "c4", "c4-new"]


class TextSource(Protocol):
    """A text before it is read."""

    @property
    def protocol(self) -> EvalProtocol:
        """How it is cut into evaluation windows."""

    @property
    def cache_key(self) -> str | None:
        """Key of its tokens in the cache, so that it need not be read again. None: the text itself."""

    def documents(self) -> list[Document]:
        """Read it."""


@dataclass(frozen=True)
class LocalFiles:
    """Local files and datasets saved to disk, one after the other; see :func:`read_documents`.

    Attributes:
        paths: the files.
        column: column of tables that holds texts or chats. None: a known one.
    """

    paths: tuple[str, ...]
    column: str | None = None
    protocol: EvalProtocol = "stream"
    cache_key: None = None

    def documents(self) -> list[Document]:
        """Read every file, in order."""
        return [document for path in self.paths for document in read_documents(path, self.column)]


@dataclass(frozen=True)
class PythonDocs:
    """The documentation of installed packages; see :func:`python_docs`."""

    split: Literal["train", "eval"]
    packages: tuple[str, ...] = (STANDARD_LIBRARY,)
    protocol: EvalProtocol = "stream"

    @property
    def cache_key(self) -> str:
        """The state of the source files, as reading them takes seconds."""
        return f"python docs {self.split} {docs_state(self.packages)}"

    def documents(self) -> list[Document]:
        """Read the docstrings."""
        return list(python_docs(self.split, self.packages))


@dataclass(frozen=True)
class HubDataset:
    """A column of a Hugging Face dataset, as :func:`datasets.load_dataset` names it, or of its local copy.

    Attributes:
        path: hub id, local folder or file, folder of `save_to_disk`, or a builder such as "json", "parquet", "text".
        name: configuration of the dataset, such as "wikitext-2-raw-v1".
        split: split to read, such as "train", "test", "train[:1000]".
        column: column that holds texts or chats, which the model's chat template writes. null: "text", or else
            "messages", "conversations", or "instruction" and "response".
        data_files: files to read instead of the whole dataset: relative to it, or local ones in their place.
        protocol: way of cutting the text into evaluation windows. "stream": documents joined by a blank line, tokenised
            once, cut into windows; "c4": GPTQ's 256 crops of C4's first validation file; "c4-new": its first 1100
            documents.
        streaming: read over the network only as far as needed, instead of downloading everything.
        max_documents: number of documents to read; needed with streaming. null: all.
        shuffle_seed: take documents at random; with streaming, each among the next 10,000. null: in order.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str | None = None
    data_files: str | list[str] | None = None
    protocol: EvalProtocol = "stream"
    streaming: bool = False
    max_documents: int | None = None
    shuffle_seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"Expected max_documents of at least 1, but got {self.max_documents}.")
        if self.streaming and self.max_documents is None:
            raise ValueError("Expected max_documents with streaming, or the whole dataset is read, but got null.")
        if self.protocol != "stream" and (self.max_documents, self.shuffle_seed) != (None, None):
            raise ValueError(
                f"Expected neither max_documents nor shuffle_seed with protocol {self.protocol!r}, which chooses the "
                f"documents, but got {self.max_documents} and {self.shuffle_seed}."
            )

    @property
    def cache_key(self) -> str | None:
        """This description, for data of the hub; None for local data, which may change."""
        files = self._files
        if self.path in _BUILDERS:
            is_local = not all("://" in file for file in files)
        else:
            is_local = Path(self.path).expanduser().exists() or bool(self._local_files)
        return None if is_local else json.dumps(dataclasses.asdict(self), sort_keys=True)

    def documents(self) -> list[Document]:
        """Read the column, one document per row.

        Raises:
            ValueError: the dataset cannot be opened, is empty, or has no such column.
        """
        count = f"at most {self.max_documents}" if self.max_documents else "all"
        _log.info("Reading %s documents of %s", count, " ".join([self._title, *self._files]))
        if not self.streaming and (files := self._tables):
            return self._selected([document for file in files for document in read_documents(file, self.column)])
        rows = self._open()
        try:
            return rows_to_documents(rows, self.column, self._title, self.max_documents, self.shuffle_seed)
        except ValueError:
            raise
        except Exception as error:  # a stream may break in many ways
            raise self._unreadable(error) from error

    def _selected(self, documents: list[Document]) -> list[Document]:
        """Return the documents of local files that split, seed and number choose, as `load_dataset` would."""
        from datasets import ReadInstruction

        # A builder puts all files into one split; a dataset's own split may be of any name.
        name = "train" if self.path in _BUILDERS else re.split(r"[\[+]", self.split)[0]
        try:
            parts = ReadInstruction.from_spec(self.split).to_absolute({name: len(documents)})
        except (ValueError, AssertionError) as error:
            raise self._unreadable(error) from error
        chosen = [document for part in parts for document in documents[part.from_ : part.to]]
        if self.shuffle_seed is not None:
            chosen = [chosen[i] for i in np.random.default_rng(self.shuffle_seed).permutation(len(chosen))]
        return chosen[: self.max_documents]

    @property
    def _title(self) -> str:
        return f"dataset {self.path!r}"

    @property
    def _files(self) -> list[str]:
        return [self.data_files] if isinstance(self.data_files, str) else list(self.data_files or [])

    @property
    def _local_files(self) -> list[str]:
        """Files on this machine that replace those of the dataset."""
        files = [str(Path(file).expanduser()) for file in self._files]
        return files if files and all(Path(file).is_file() for file in files) else []

    @property
    def _tables(self) -> list[str]:
        """Local tables that are the whole dataset: of them only the needed columns are read."""
        path = Path(self.path).expanduser()
        files = [str(path)] if path.is_file() else [] if path.is_dir() else self._local_files
        same = self.path in _BUILDERS
        return (
            files
            if all(table_kind(file) in ({self.path} if same else {"json", "csv", "parquet"}) for file in files)
            else []
        )

    def _open(self) -> "Dataset | IterableDataset":
        from datasets import concatenate_datasets, load_dataset

        path = Path(self.path).expanduser()
        if self.path not in _BUILDERS and is_saved(path) and not self.data_files:
            return open_saved(path, self.split)
        arguments = self._arguments(path)
        try:
            if not self.streaming or arguments["path"] != "json":
                return load_dataset(**arguments, split=self.split, streaming=self.streaming)
            streams = self._streams(arguments)
        except Exception as error:  # the library raises a dozen types, all of which mean this
            raise self._unreadable(error) from error
        columns = [
            text_columns(stream.column_names or list(next(iter(stream), {})), self.column, self._title)
            for stream in streams
        ]
        chosen = [stream.select_columns(list(names)) for stream, names in zip(streams, columns, strict=True)]
        return concatenate_datasets(chosen)

    def _streams(self, arguments: dict[str, Any]) -> "list[IterableDataset]":
        """Open JSON files one by one, as their other columns need not agree: those of RedPajama do not."""
        from datasets import load_dataset, load_dataset_builder

        files = load_dataset_builder(**arguments).config.data_files
        if self.split not in files:
            raise ValueError(f"it has the splits {list(files)}")
        return [
            load_dataset("json", data_files={self.split: glob.escape(file)}, split=self.split, streaming=True)
            for file in files[self.split]
        ]

    def _arguments(self, path: Path) -> dict[str, Any]:
        """Return the arguments by which `load_dataset` finds the files."""
        if self.path in _BUILDERS:
            return {"path": self.path, "name": self.name, "data_files": self.data_files}
        split = re.split(r"[\[+]", self.split)[0]
        files = [str(path)] if path.is_file() else [] if path.is_dir() else self._local_files
        if files:
            builder = table_kind(files[0])
            whole = {"path": "text", "sample_by": "document"}
            return {
                **({"path": builder} if builder else whole),
                "data_files": {split: [glob.escape(file) for file in files]},
            }
        # As everywhere else, a file of text is one document, not one a line.
        documents = {"sample_by": "document"} if is_folder_of_texts(path) else {}
        if self.data_files is None:
            return {"path": self.path, "name": self.name, **documents}
        # Some files have fewer documents than the dataset's metadata: its checks would refuse them.
        part = {"data_files": {split: self.data_files}, "verification_mode": "no_checks"}
        return {"path": self.path, "name": self.name, **part, **documents}

    def _unreadable(self, error: Exception) -> ValueError:
        files = ", ".join(self._files)
        if self.path not in _BUILDERS:
            what = f"{files} of {self.path}" if files else f"the {self.split} split of {self.path}"
            advice = f"Check the name and the network, or download {what} and give it as data_files here, or a folder "
            advice += "that save_to_disk wrote as path"
        elif "://" in files:
            advice = f"Check the network, or download {files} and give it as data_files here"
        else:
            advice = f"Check that {files or 'data_files'} can be read"
        return ValueError(
            f"Could not open {self._title} (name {self.name!r}, split {self.split!r}): {first_line(error)}. {advice}, "
            "or give text files instead (data.calibration_files, data.eval_files)."
        )
