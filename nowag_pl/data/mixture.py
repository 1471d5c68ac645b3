"""Calibration text of several sources: pieces of each, in turn, by their shares of the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nowag_pl.data.expansion import named_files
from nowag_pl.data.sources import HubDataset, LocalFiles, TextSource
from nowag_pl.functional.ranges import check_real, check_whole


@dataclass(frozen=True)
class TextPart:
    """One source of a mixture.

    Attributes:
        files: files as for data.calibration_files. null: a dataset.
        dataset: Hugging Face dataset, instead of files. null: files.
        share: its share of the tokens, relative to those of the other parts.
        length: tokens that are taken from it at a time. null: data.seq_len.
        column: column of its tables that holds texts, or chats, which the model's chat template writes. null: a known
            one.
    """

    files: str | list[str] | None = None
    dataset: HubDataset | None = None
    share: float = 1.0
    length: int | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: there are files and a dataset, or neither; or a number is out of its range.
        """
        if bool(self.files) == (self.dataset is not None):
            raise ValueError(
                f"Expected files or a dataset in each part of data.calibration_mixture, but got "
                f"{'both' if self.files else 'neither'}."
            )
        check_real("data.calibration_mixture.share", self.share, above=True)
        if self.length is not None:
            check_whole("data.calibration_mixture.length", self.length, 2)

    @property
    def paths(self) -> list[str]:
        """Its files as they were given."""
        return [self.files] if isinstance(self.files, str) else list(self.files or [])

    def source(self) -> TextSource:
        """Return the text before it is read.

        Raises:
            ValueError: a path names no file.
        """
        return self.dataset or LocalFiles(named_files(self.paths), self.column)


def mixed(streams: Sequence[Tensor], shares: Sequence[float], lengths: Sequence[int]) -> Tensor:
    """Return one stream of pieces of several, each next piece from the stream that is furthest behind its share.

    It ends where that stream has no whole piece left, so that no text is repeated and shares hold throughout.

    Args:
        streams: token ids `[num_tokens]` of each.
        shares: shares of the tokens, relative to each other.
        lengths: tokens of a piece of each.

    Returns:
        Token ids `[num_tokens]`.

    Raises:
        ValueError: a stream is shorter than one piece; the message has its number.

    Example:
        >>> ones, twos = torch.full((4,), 1), torch.full((4,), 2)
        >>> mixed([ones, twos], [2.0, 1.0], [1, 1]).tolist()
        [1, 2, 1, 1, 2, 1]
    """
    for number, (stream, length) in enumerate(zip(streams, lengths, strict=True)):
        if len(stream) < length:
            raise ValueError(f"part {number}: Expected text of at least {length} tokens, but got {len(stream)}.")
    taken, pieces = [0] * len(streams), list[Tensor]()
    while True:
        number = min(range(len(streams)), key=lambda each: taken[each] / shares[each])
        start, stop = taken[number], taken[number] + lengths[number]
        if stop > len(streams[number]):
            return torch.cat(pieces)
        pieces.append(streams[number][start:stop])
        taken[number] = stop
