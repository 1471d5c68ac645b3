"""Text to tokens to windows, by the protocol of the compression papers.

Documents are joined by a blank line and tokenised once, with a beginning-of-sequence token at the very start if the
tokenizer has one. Evaluation cuts the stream into whole windows and drops the tail; calibration takes windows at
random places. Models that were trained with that token before every text, such as Gemma, need it in each window: there
it takes the place of the first token.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nowag_pl.files import read_tensors, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
# Where the beginning-of-sequence token stands: before the whole text, or at the beginning of every window.
BosPlace = Literal["stream", "window"]
_CACHE_VERSION = "2"
LEAST_DISTINCT = 8
FEW_DISTINCT = 200
_LONG_TEXT = 10_000_000  # characters; worth a word while it takes its time


def tokenize(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", cache_dir: Path | None = None) -> Tensor:
    """Join documents by a blank line and tokenise them once.

    Args:
        documents: texts.
        tokenizer: the model's tokenizer. Its beginning-of-sequence token, if any, comes first.
        cache_dir: folder in which the tokens are kept under the hash of text and tokenizer. None keeps nothing.

    Returns:
        Token ids `[num_tokens]`, int32.
    """
    text = "\n\n".join(documents)
    return cached_tokens([text], tokenizer, cache_dir, lambda: stream_of(text, tokenizer))


def stream_of(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Tokenise a text as one stream, after one beginning-of-sequence token if the tokenizer has one.

    Returns:
        Token ids `[num_tokens]`, int32.
    """
    if len(text) >= _LONG_TEXT:
        _log.info("Tokenising %.0f million characters", len(text) / 1e6)
    with no_length_limit(tokenizer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # A chat template may have begun the text with this token already.
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return torch.tensor(ids, dtype=torch.int32)


@contextmanager
def no_length_limit(tokenizer: "PreTrainedTokenizerBase") -> Iterator[None]:
    """Keep a tokenizer from warning that a text is too long for the model: it is not one input."""
    limit, tokenizer.model_max_length = tokenizer.model_max_length, sys.maxsize
    try:
        yield
    finally:
        tokenizer.model_max_length = limit


def cached_tokens(
    key: Sequence[str], tokenizer: "PreTrainedTokenizerBase", cache_dir: Path | None, make: Callable[[], Tensor]
) -> Tensor:
    """Return tokens from the cache, or make and keep them.

    Args:
        key: everything except the tokenizer that determines the tokens: the text, or the description of a dataset.
        tokenizer: the model's tokenizer.
        cache_dir: folder of the cache. None keeps nothing.
        make: makes the tokens.
    """
    if cache_dir is None:
        return make()
    file = cache_dir / f"{_digest(key, tokenizer)}.safetensors"
    if file.exists():
        try:
            return read_tensors(file)[0]["tokens"]
        except ValueError:
            _log.warning("Tokenising again: the cached file %s is damaged.", file)
    tokens = make()
    try:
        write_tensors(file, {"tokens": tokens})
    except OSError as error:
        _log.warning("Tokens are not cached: %s", error)
    return tokens


def _digest(key: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash everything that determines the tokens."""
    digest = hashlib.sha256(_CACHE_VERSION.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    for part in (description, str(tokenizer.bos_token_id), template, *key):
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def tokens_digest(tokens: Tensor) -> str:
    """Return the SHA-256 of token ids, equal for equal ids of any integer type."""
    return hashlib.sha256(tokens.to(torch.int32).contiguous().numpy().tobytes()).hexdigest()


def check_variety(tokens: Tensor, name: str) -> None:
    """Look whether tokens can calibrate: those of a blank text, or of one word over and over, cannot.

    Args:
        tokens: the stream, `[num_tokens]`; a very short one is refused for its length elsewhere.
        name: of the text, for messages.

    Raises:
        ValueError: fewer than eight different ones.
    """
    distinct = len(tokens.unique())
    share = f"{distinct} different tokens among {tokens.numel()} ({distinct / max(tokens.numel(), 1):.2%})"
    if distinct < LEAST_DISTINCT <= tokens.numel():
        raise ValueError(
            f"{name}: Expected text to calibrate on, but got {share}: it is blank, or repeats itself. Most input "
            "channels would be dead. Give other text."
        )
    if distinct < FEW_DISTINCT <= tokens.numel():
        _log.warning("%s: only %s. Channels that other text needs may seem dead.", name, share)


def whole_windows(tokens: Tensor, seq_len: int) -> Tensor:
    """Cut a token stream into consecutive windows and drop the tail.

    Args:
        tokens: `[num_tokens]`.
        seq_len: tokens per window.

    Returns:
        `[num_windows, seq_len]`, at least one window.

    Raises:
        ValueError: there are fewer tokens than one window.
    """
    _require_one_window(tokens, seq_len)
    num_windows = len(tokens) // seq_len
    return tokens[: num_windows * seq_len].view(num_windows, seq_len)


def random_windows(tokens: Tensor, seq_len: int, num_sequences: int, seed: int) -> Tensor:
    """Take windows at uniformly random places of a token stream.

    Args:
        tokens: `[num_tokens]`.
        seq_len: tokens per window.
        num_sequences: windows to take; they may overlap.
        seed: the same seed gives the same windows on every rank and machine.

    Returns:
        `[num_sequences, seq_len]`.

    Raises:
        ValueError: there are fewer tokens than one window, or `num_sequences` is not positive.
    """
    _require_one_window(tokens, seq_len)
    if num_sequences < 1:
        raise ValueError(f"Expected num_sequences of at least 1, but got {num_sequences}.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - seq_len + 1, (num_sequences, 1), generator=generator)
    return tokens[starts + torch.arange(seq_len)]  # [num_sequences, seq_len]


def begin_windows(windows: Tensor, bos_token_id: int) -> Tensor:
    """Return windows whose first token is the beginning of a sequence, in place of the text's.

    The other tokens stay where they are, so that the same tokens are predicted with and without it.

    Args:
        windows: `[num_windows, seq_len]`.
        bos_token_id: the token.

    Example:
        >>> begin_windows(torch.tensor([[5, 6, 7], [8, 9, 5]]), 1).tolist()
        [[1, 6, 7], [1, 9, 5]]
    """
    return torch.cat([torch.full_like(windows[:, :1], bos_token_id), windows[:, 1:]], dim=1)


def _require_one_window(tokens: Tensor, seq_len: int) -> None:
    if len(tokens) < seq_len:
        raise ValueError(
            f"Expected text of at least seq_len = {seq_len} tokens, but got {len(tokens)}. "
            "Give more text or a smaller data.seq_len."
        )
