"""Tokens for calibration, training and evaluation."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from nowag_pl.data.expansion import named_files
from nowag_pl.data.mixture import TextPart, mixed
from nowag_pl.data.protocols import evaluation_windows, stream_tokens
from nowag_pl.data.python_docs import STANDARD_LIBRARY
from nowag_pl.data.sources import HubDataset, LocalFiles, PythonDocs, TextSource
from nowag_pl.data.tables import table_kind
from nowag_pl.data.tokens import BosPlace, begin_windows, check_variety, random_windows, whole_windows
from nowag_pl.functional.ranges import check_whole
from nowag_pl.lit.batches import ResumableLoader, Share, SharedBatches
from nowag_pl.lit.phases import PhasedTrainer
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.family_checks import needs_bos
from nowag_pl.stages.plan import DEFAULT_BATCH

_log = logging.getLogger(__name__)
DEFAULT_SEQ_LEN_LIMIT = 2048
BUILT_IN_EVAL = "python-docs"
_MIXTURE = "data.calibration_mixture"


class TokenDataModule(LightningDataModule):
    """Text for calibration, training and evaluation, cut into windows of equal length.

    Without any files or datasets the text is the documentation of Python's standard library, read from this
    machine. Calibration and training share their text; evaluation uses another text unless you give it the same.

    Args:
        calibration_files: files to calibrate (and train) on: UTF-8 text, or .json, .jsonl, .ndjson, .parquet, .csv or
            .tsv with a column of texts or chats, each also as .gz, or a folder written by datasets' save_to_disk. null:
            the dataset, or the built-in text.
        eval_files: files of the same kinds to measure perplexity on, by their name in the report. null: the datasets,
            or the built-in text.
        calibration_dataset: Hugging Face dataset to calibrate (and train) on, instead of files. null: none.
        calibration_mixture: several sources to calibrate (and train) on, instead of one: a list of parts, each with
            files or a dataset, its share of the tokens, and the length of the pieces that are taken from it in turn.
            null: none.
        eval_datasets: Hugging Face datasets to measure perplexity on, by name, each by its own protocol. null: none.
        python_packages: installed packages whose docstrings are the built-in text; "stdlib" is Python's own library,
            the default (null).
        bos: place of the beginning-of-sequence token, if the tokenizer has one: "stream" at the very start of a text,
            as in the compression papers, or "window" in place of the first token of every window, for calibration,
            training and evaluation alike. null: "window" for the Gemma family, which predicts badly without it, and
            "stream" for others.
        column: column of calibration_files and eval_files that holds texts, or chats, which the model's chat template
            writes. null: "text", or else "messages", "conversations", or "instruction" and "response".
        seq_len: tokens per window. null: the model's maximum, but at most 2048.
        eval_batch_size: windows evaluated at a time on each device. null: 8, or as many as fit by the preflight's
            estimate.
        eval_chunk_mib: memory for logits that are measured together, in MiB; a large vocabulary does not take more.
        train_batch_size: windows per training step on each device.
        max_train_windows: train end to end on the first windows of the text only. null: all.
        max_eval_windows: evaluate only the first windows of each text. null: all.
        cache_dir: folder for tokens, stored under a hash of tokenizer and text, or of a hub dataset's description, so
            that the dataset is opened only once. null: nowag_pl in the user's cache.
    """

    def __init__(  # noqa: PLR0913 - each is an option of the command line
        self,
        calibration_files: str | list[str] | None = None,
        eval_files: str | dict[str, str | list[str]] | None = None,
        calibration_dataset: HubDataset | None = None,
        calibration_mixture: list[TextPart] | None = None,
        eval_datasets: dict[str, HubDataset] | None = None,
        python_packages: list[str] | None = None,
        bos: BosPlace | None = None,
        column: str | None = None,
        seq_len: int | None = None,
        eval_batch_size: int | None = None,
        eval_chunk_mib: int = 256,
        train_batch_size: int = 8,
        max_train_windows: int | None = None,
        max_eval_windows: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _check_sources(calibration_files, calibration_dataset, eval_files, eval_datasets, python_packages, column)
        _check_mixture(calibration_mixture, calibration_files, calibration_dataset, python_packages)
        for name, value in {
            "seq_len": seq_len,
            "eval_batch_size": eval_batch_size,
            "eval_chunk_mib": eval_chunk_mib,
            "train_batch_size": train_batch_size,
            "max_train_windows": max_train_windows,
            "max_eval_windows": max_eval_windows,
        }.items():
            least = 2 if name == "seq_len" else 1
            if value is not None:
                check_whole(f"data.{name}", value, least)
        if isinstance(eval_files, str) and eval_files.startswith("{"):
            raise ValueError(
                f"Expected data.eval_files to be a file, or names with files, but got {eval_files!r}. YAML wants a "
                "space after the colon: {name: file.txt}"
            )
        self.calibration_files = _as_list(calibration_files)
        self.calibration_dataset = calibration_dataset
        self.calibration_mixture = calibration_mixture or []
        named = (
            {Path(eval_files).stem.strip("*?[]") or "text": eval_files} if isinstance(eval_files, str) else eval_files
        )
        self.eval_files = {name: _as_list(files) for name, files in (named or {}).items()}
        self.eval_datasets = eval_datasets or {}
        self.python_packages = python_packages or [STANDARD_LIBRARY]
        self._bos = bos
        self.column = column
        self._seq_len = seq_len
        self.eval_batch_size = DEFAULT_BATCH if eval_batch_size is None else eval_batch_size
        self.has_free_batch = eval_batch_size is None
        self.eval_chunk_mib = eval_chunk_mib
        self.train_batch_size = train_batch_size
        self.max_train_windows = max_train_windows
        self.max_eval_windows = max_eval_windows
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else _user_cache()
        self._calibration_tokens: Tensor | None = None
        self.eval_windows: dict[str, Tensor] = {}  # name: [num_windows, seq_len]

    @property
    def places(self) -> list[tuple[str, Path]]:
        """Options that name local files, and these."""
        named = [("data.calibration_files", file) for file in self.calibration_files]
        named += [(_MIXTURE, file) for part in self.calibration_mixture for file in part.paths]
        named += [(f"data.eval_files.{name}", file) for name, files in self.eval_files.items() for file in files]
        whole = [(option, Path(file)) for option, file in named if Path(file).expanduser().is_dir()]
        return whole + [(option, Path(each)) for option, file in named for each in _named_files(option, file)]

    @property
    def checkpoint(self) -> Checkpoint:
        """The model that the text is tokenised for."""
        return self._module.checkpoint

    @property
    def _attached(self) -> Trainer:
        """The Trainer that has taken this data."""
        if self.trainer is None:
            raise RuntimeError("Expected a Trainer that has taken this data, but got none.")
        return self.trainer

    @property
    def _module(self) -> TextModule:
        """The model that the data is for."""
        module = self._attached.lightning_module
        if not isinstance(module, TextModule):
            raise TypeError(f"Expected a TextModule, but got {type(module).__name__}.")
        return module

    @property
    def eval_names(self) -> list[str]:
        """Names of the evaluation texts in their order."""
        return [*self.eval_files, *self.eval_datasets] or [BUILT_IN_EVAL]

    @property
    def seq_len(self) -> int:
        """Tokens per window.

        Raises:
            ValueError: it is longer than the model's context.
        """
        longest = self.checkpoint.max_seq_len
        if self._seq_len is None:
            return default_seq_len(self.checkpoint)
        if longest is not None and self._seq_len > longest:
            raise ValueError(
                f"Expected data.seq_len of at most {longest}, the context of {self.checkpoint.path}, "
                f"but got {self._seq_len}."
            )
        return self._seq_len

    @property
    def bos(self) -> BosPlace:
        """Place of the beginning-of-sequence token.

        Raises:
            ValueError: every window should begin with that token, but the tokenizer has none.
        """
        has_token = self.checkpoint.tokenizer.bos_token_id is not None
        if self._bos == "window" and not has_token:
            raise ValueError(
                f"Expected a tokenizer with a beginning-of-sequence token for data.bos=window, but that of "
                f"{self.checkpoint.path} has none."
            )
        if self._bos is not None:
            return self._bos
        return "window" if has_token and needs_bos(self.checkpoint.config.model_type) else "stream"

    def _begun(self, windows: Tensor) -> Tensor:
        """Return windows with their beginning-of-sequence token, where each has one."""
        return begin_windows(windows, self.checkpoint.tokenizer.bos_token_id) if self.bos == "window" else windows

    def prepare_data(self) -> None:
        """Tokenise everything once, on one process, into the cache."""
        if self._seq_len is None and (self.checkpoint.max_seq_len or self.seq_len + 1) > self.seq_len:
            _log.warning(
                "data.seq_len is not given: using %d tokens, less than the model's maximum of %s.",
                self.seq_len,
                self.checkpoint.max_seq_len,
            )
        self.setup()
        trainer = self._attached
        is_shared = trainer.world_size > 1 and isinstance(trainer, PhasedTrainer) and trainer.compressing
        if is_shared and (self.calibration_dataset or any(part.dataset for part in self.calibration_mixture)):
            # Reading the property fills the cache; without it every rank would fetch the dataset.
            self.calibration_tokens  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Read the tokens of every text."""
        if self.eval_windows:
            return
        seq_len, tokenizer = self.seq_len, self.checkpoint.tokenizer
        for name in self.eval_names:
            option, source = self._eval_source(name)
            with _naming(option):
                windows = evaluation_windows(source, tokenizer, seq_len, self.cache_dir)
            self.eval_windows[name] = self._known_ids(self._begun(windows[: self.max_eval_windows]))

    def _eval_source(self, name: str) -> tuple[str, TextSource]:
        """Return the option that gives an evaluation text, and the text."""
        if name in self.eval_files:
            option = f"data.eval_files.{name}"
            return option, LocalFiles(_named_files(option, self.eval_files[name]), self.column)
        if name in self.eval_datasets:
            return f"data.eval_datasets.{name}", self.eval_datasets[name]
        return "built-in text", PythonDocs("eval")

    def _calibration_source(self) -> tuple[str, TextSource]:
        """Return the option that gives the calibration text, and the text."""
        if self.calibration_files:
            option = "data.calibration_files"
            return option, LocalFiles(_named_files(option, self.calibration_files), self.column)
        if self.calibration_dataset is not None:
            return "data.calibration_dataset", self.calibration_dataset
        return "data.python_packages", PythonDocs("train", tuple(self.python_packages))

    def _known_ids(self, tokens: Tensor) -> Tensor:
        """Return the tokens unchanged if all are in the model's vocabulary."""
        size = self.checkpoint.vocab_size
        if tokens.numel() and int(tokens.max()) >= size:
            raise ValueError(
                f"Expected token ids under {size}, the vocabulary of {self.checkpoint.path}, but its tokenizer gave "
                f"{int(tokens.max())}: it belongs to another model."
            )
        return tokens

    @property
    def calibration_tokens(self) -> Tensor:
        """The token stream for calibration and training, `[num_tokens]`."""
        if self._calibration_tokens is None:
            option, source = (_MIXTURE, None) if self.calibration_mixture else self._calibration_source()
            with _naming(option):
                tokens = self._mixed_tokens() if source is None else self._stream(source)
            check_variety(tokens, option)
            self._calibration_tokens = self._known_ids(tokens)
        return self._calibration_tokens

    def _stream(self, source: TextSource) -> Tensor:
        return stream_tokens(source, self.checkpoint.tokenizer, self.cache_dir)

    def _mixed_tokens(self) -> Tensor:
        """Return the tokens of the mixture, and say how many come from each part."""
        parts = self.calibration_mixture
        shares, lengths = [part.share for part in parts], [part.length or self.seq_len for part in parts]
        tokens = mixed([self._stream(part.source()) for part in parts], shares, lengths)
        percent = [f"{100 * share / sum(shares):.3g} %" for share in shares]
        _log.info("Calibration text: %d tokens, from its parts %s", len(tokens), ", ".join(percent))
        return tokens

    def calibration_windows(self, num_sequences: int, seed: int) -> Tensor:
        """Return calibration sequences `[num_sequences, seq_len]`, the same on every rank."""
        return self._begun(random_windows(self.calibration_tokens, self.seq_len, num_sequences, seed))

    def finetuning_windows(self, num_train: int, num_held_out: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return sequences to train blocks on and to hold out, from parts of the text that do not overlap.

        Args:
            num_train: sequences from the first part of the calibration text.
            num_held_out: sequences from the rest; the text is divided in proportion.
            seed: which places.

        Returns:
            `[num_train, seq_len]`, `[num_held_out, seq_len]`, the same on every rank.
        """
        tokens = self.calibration_tokens
        cut = len(tokens) * num_train // (num_train + num_held_out)
        cut = min(max(cut, self.seq_len), len(tokens) - self.seq_len)
        if cut < self.seq_len:
            raise ValueError(
                f"Expected calibration text of at least two windows of {self.seq_len} tokens to finetune on, but got "
                f"{len(tokens)} tokens. Give more text or a smaller data.seq_len."
            )
        train = random_windows(tokens[:cut], self.seq_len, num_train, seed)
        held_out = random_windows(tokens[cut:], self.seq_len, num_held_out, seed)
        return self._begun(train), self._begun(held_out)

    @property
    def train_windows(self) -> Tensor:
        """Windows of the calibration text to train end to end on, `[num_windows, seq_len]`."""
        return self._begun(whole_windows(self.calibration_tokens, self.seq_len)[: self.max_train_windows])

    def train_dataloader(self) -> ResumableLoader:
        """Return shuffled windows of the calibration text, `{"tokens", "index", "weight"}`.

        Their order and batches are the same on any number of ranks if `train_batch_size` times the ranks is. An
        objective may have batches of its own.
        """
        own = self._module.own_train_dataloader()
        return own if own is not None else self._loader(self.train_windows, self.train_batch_size, seed=0)

    def val_dataloader(self) -> list[ResumableLoader]:
        """Return one loader per evaluation text, `{"tokens": [batch, seq_len], "index": [batch], "weight": [batch]}`.

        Each rank takes every n-th window. Every rank has equally many batches, as sharded models need; padding
        has weight 0 and does not count, so that the perplexity is the same on any number of ranks.
        """
        return [self._loader(windows, self.eval_batch_size, seed=None) for windows in self.eval_windows.values()]

    def _loader(self, windows: Tensor, batch_size: int, seed: int | None) -> ResumableLoader:
        rank, world_size = self._attached.global_rank, self._attached.world_size
        batches = SharedBatches(len(windows), batch_size * world_size, rank, world_size, seed)
        return ResumableLoader(_Windows(windows), batches)


class _Windows(Dataset[dict[str, Tensor]]):
    """Windows with their indices and weights, a whole batch at a time."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __getitem__(self, share: Share) -> dict[str, Tensor]:
        index = torch.tensor(share.indices)
        return {"tokens": self._windows[index].long(), "index": index, "weight": torch.tensor(share.weights)}


def _check_sources(
    calibration_files: str | list[str] | None,
    calibration_dataset: HubDataset | None,
    eval_files: str | dict[str, str | list[str]] | None,
    eval_datasets: dict[str, HubDataset] | None,
    python_packages: list[str] | None,
    column: str | None,
) -> None:
    """Raise ValueError if the options name a text in two ways."""
    for name, texts in {
        "calibration_files": calibration_files,
        "eval_files": eval_files,
        "eval_datasets": eval_datasets,
        "python_packages": python_packages,
    }.items():
        if texts is not None and not texts:
            raise ValueError(f"Expected an entry in data.{name}, but got {texts}. null takes the default.")
    of_texts = list(eval_files.values()) if isinstance(eval_files, dict) else [eval_files]
    files = [file for each in (calibration_files, *of_texts) for file in _as_list(each)]
    if column is not None and not any(table_kind(file) or Path(file).expanduser().is_dir() for file in files):
        raise ValueError(
            f"Expected a table in data.calibration_files or data.eval_files with data.column, but got {column!r} and "
            "no table. Datasets have a column of their own."
        )
    if python_packages and (calibration_files or calibration_dataset):
        raise ValueError(
            f"Expected no data.python_packages with text of your own, but got {python_packages}: they are not used."
        )
    if calibration_files and calibration_dataset:
        raise ValueError("Expected data.calibration_files or data.calibration_dataset, but got both.")
    if calibration_dataset and calibration_dataset.protocol != "stream":
        raise ValueError(
            f"Expected data.calibration_dataset.protocol to be 'stream', but got {calibration_dataset.protocol!r}, "
            "which is for evaluation."
        )
    names = set() if isinstance(eval_files, str) else set(eval_files or {})
    if both := sorted(names & set(eval_datasets or {})):
        raise ValueError(f"Expected each name in data.eval_files or data.eval_datasets, but got {both[0]!r} in both.")


def _check_mixture(mixture: list[TextPart] | None, *others: object) -> None:
    """Raise ValueError if a mixture is empty, or another option names calibration text as well."""
    if mixture is None:
        return
    if not mixture:
        raise ValueError(f"Expected an entry in {_MIXTURE}, but got {mixture}. null takes the default.")
    if any(others):
        raise ValueError(
            f"Expected {_MIXTURE} alone, but got data.calibration_files, data.calibration_dataset or "
            "data.python_packages as well: give them as parts of it."
        )
    if any(part.dataset is not None and part.dataset.protocol != "stream" for part in mixture):
        raise ValueError(f"Expected datasets of {_MIXTURE} with protocol 'stream': others are for evaluation.")


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Put the option that was at fault before an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _as_list(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])


def _named_files(option: str, files: str | list[str]) -> tuple[str, ...]:
    """Return the files that paths of an option name."""
    with _naming(option):
        return named_files(files)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nowag_pl" / "tokens"


def data_of(trainer: Trainer) -> TokenDataModule:
    """Return a Trainer's data with its own type.

    Raises:
        TypeError: it is another data module.
    """
    # Lightning declares this attribute nowhere.
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, TokenDataModule):
        raise TypeError(f"Expected a TokenDataModule, but got {type(datamodule).__name__}.")
    return datamodule


def default_seq_len(checkpoint: Checkpoint) -> int:
    """Return the default number of tokens of a window or question: the model's context, but at most 2048."""
    return min(checkpoint.max_seq_len or DEFAULT_SEQ_LEN_LIMIT, DEFAULT_SEQ_LEN_LIMIT)
