"""Where text comes from: local files and Hugging Face datasets, each a list of documents."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubDataset:
    """A column of a Hugging Face dataset, as :func:`datasets.load_dataset` names it.

    Attributes:
        path: hub id, local folder, or a builder such as "json", "parquet", "text".
        name: configuration of the dataset, such as "wikitext-2-raw-v1".
        split: split to read, such as "train", "test", "train[:1000]".
        column: column that holds the text.
        data_files: files to read instead of the whole dataset, relative to it.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    data_files: str | list[str] | None = None

    def documents(self) -> list[str]:
        """Read the column, one document per row.

        Raises:
            ValueError: the dataset cannot be opened, or has no such column.
        """
        from datasets import load_dataset

        try:
            rows = load_dataset(self.path, self.name, split=self.split, data_files=self.data_files)
        except Exception as error:  # the library raises a dozen types, all of which mean this
            raise ValueError(
                f"Could not open dataset {self.path!r} (name {self.name!r}, split {self.split!r}): {error}. "
                "Check the name and the network, or give local text files instead "
                "(data.calibration_files, data.eval_files)."
            ) from error
        if self.column not in rows.column_names:
            raise ValueError(
                f"Expected dataset {self.path!r} to have a column {self.column!r}, but got {rows.column_names}."
            )
        return list(rows[self.column])


def read_text_file(path: str | Path) -> str:
    """Read one UTF-8 text file.

    Raises:
        ValueError: the file is missing, not readable, or not UTF-8 text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Expected {path} to be a readable UTF-8 text file, but got: {reason}.") from error
