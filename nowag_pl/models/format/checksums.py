"""Find damaged files of a model folder by the SHA-256 of each, which its index holds."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nowag_pl.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checksums:
    """The checksums of a folder. Each file is read for its checksum once, when it is first asked for.

    Folders without checksums, as other programs write them, pass.

    Args:
        folder: a model folder.
        enabled: False trusts every file.
    """

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self._folder = folder
        self._enabled = enabled
        self._unchecked: dict[str, str] | None = None

    def check_small_files(self, may_lack: bool = False) -> None:
        """Check everything but the weights.

        Args:
            may_lack: files that the index names may not be there, as in a folder that a hub's client fills.

        Raises:
            ValueError: a file is damaged or missing.
        """
        files = [self._folder / name for name in self._pending() if not name.endswith(".safetensors")]
        self.check(*(file for file in files if file.is_file() or not may_lack))

    def check(self, *files: Path) -> None:
        """Check files, if the folder has checksums for them.

        Raises:
            ValueError: a file is damaged or missing.
        """
        for file in files:
            name = file.relative_to(self._folder).as_posix()
            expected = self._pending().get(name)
            if expected is None:
                continue
            if not file.is_file():
                raise ValueError(
                    f"Expected {self._folder} to hold {name!r}, which its index names, but it is not there."
                )
            if file_digest(file) != expected:
                raise ValueError(
                    f"Expected {file} as it was written, but its SHA-256 is another than {INDEX_FILE} says: it is "
                    "damaged, copy it again. If you changed it on purpose, take its line out of the index."
                )
            del self._pending()[name]

    def covers(self, files: Iterable[Path]) -> bool:
        """Tell whether all of these files have checksums: not if another program wrote weights into the folder."""
        return all(file.parent == self._folder and file.name in self._pending() for file in files)

    def _pending(self) -> dict[str, str]:
        """Return the checksums that have not been compared yet, by file."""
        if self._unchecked is None:
            self._unchecked = _recorded(self._folder / INDEX_FILE) if self._enabled else {}
        return self._unchecked


def _recorded(index: Path) -> dict[str, str]:
    """Return the checksums in an index; none where there is no index, or one that another program wrote.

    Raises:
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    if not index.is_file():
        return {}
    content: Any = read_json(index)
    for key in ("metadata", "sha256"):
        content = content.get(key, {}) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError(f"Expected {index} to hold an index of weights, but it is damaged: copy it again.")
    for name, digest in content.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not isinstance(digest, str):
            raise ValueError(f"Expected {index} to have checksums of files in its folder, but got {name!r}.")
    # Transformers' save_pretrained writes one file and leaves the index of an earlier export, which is void then.
    is_stale = SINGLE_FILE not in content and (index.parent / SINGLE_FILE).is_file()
    return {} if is_stale else dict(content)
