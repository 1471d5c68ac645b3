"""Windows of an evaluation text: the whole stream, or one of the two ways in which papers cut C4.

Both ways for C4 are those of the GPTQ repository (https://github.com/IST-DASLab/gptq, datautils.py: `get_c4` and
`get_c4_new`), rewritten from their description. Their figures differ: never compare one with the other. Both take
the first file of C4's validation set, en/c4-validation.00000-of-00008.json.gz of allenai/c4:

- "c4", which QuIP# follows: 256 times, documents are drawn with Python's `random`, seed 0, until one has at least
  `seq_len` tokens; a window is taken from a random place of it. Each document is tokenised by itself, with the
  special tokens that the tokenizer adds.
- "c4-new": the first 1100 documents, joined by a space, tokenised as one stream after one
  beginning-of-sequence token, at most 256 windows.
"""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nowag_pl.data.chats import as_texts
from nowag_pl.data.sources import TextSource
from nowag_pl.data.tokens import cached_tokens, no_length_limit, stream_of, tokenize, whole_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
C4_WINDOWS = 256
C4_NEW_DOCUMENTS = 1100
C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
C4_FILE_DOCUMENTS = 45_576


def stream_tokens(source: TextSource, tokenizer: "PreTrainedTokenizerBase", cache_dir: Path | None = None) -> Tensor:
    """Return the text of a source as one stream of tokens, for calibration or as consecutive windows.

    Args:
        source: the text. It is not opened if its tokens are in the cache under its description.
        tokenizer: the model's tokenizer.
        cache_dir: folder of the token cache. None keeps nothing.

    Returns:
        Token ids `[num_tokens]`, int32.
    """
    if source.cache_key is None:
        return tokenize(as_texts(source.documents(), tokenizer), tokenizer, cache_dir)
    key = ["stream", source.cache_key]
    return cached_tokens(
        key, tokenizer, cache_dir, lambda: tokenize(as_texts(source.documents(), tokenizer), tokenizer)
    )


def evaluation_windows(
    source: TextSource, tokenizer: "PreTrainedTokenizerBase", seq_len: int, cache_dir: Path | None = None
) -> Tensor:
    """Cut a text into evaluation windows by the protocol of its source.

    Args:
        source: the text. It is not opened if its tokens are in the cache under its description.
        tokenizer: the model's tokenizer.
        seq_len: tokens per window.
        cache_dir: folder of the token cache. None keeps nothing.

    Returns:
        `[num_windows, seq_len]`, int32.

    Raises:
        ValueError: the source cannot be read, or holds too little text for its protocol.
    """
    if source.protocol == "stream":
        return whole_windows(stream_tokens(source, tokenizer, cache_dir), seq_len)
    if source.protocol == "c4":
        key = [source.protocol, str(seq_len)]
        return _tokens(source, tokenizer, cache_dir, key, lambda texts: c4_crops(texts, tokenizer, seq_len))
    stream = _tokens(source, tokenizer, cache_dir, [source.protocol], lambda texts: c4_new_stream(texts, tokenizer))
    return whole_windows(stream, seq_len)[:C4_WINDOWS]


def c4_crops(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Tensor:
    """Draw the 256 crops of protocol "c4".

    A document of exactly `seq_len` tokens, at which GPTQ's code stops with an error, is taken whole, as AQLM does.

    Args:
        documents: the validation file's.
        tokenizer: the model's tokenizer.
        seq_len: tokens per crop.

    Returns:
        `[256, seq_len]`, int32.

    Raises:
        ValueError: no document is long enough.
    """
    if len(documents) != C4_FILE_DOCUMENTS:
        _log.warning(
            "These are not the papers' C4 crops: expected the %d documents of %s, but got %d.",
            *(C4_FILE_DOCUMENTS, C4_FILE, len(documents)),
        )
    _log.info("Drawing %d crops of %d tokens from %d documents", C4_WINDOWS, seq_len, len(documents))
    draw = random.Random(0)
    too_short: set[int] = set()
    crops: list[list[int]] = []
    with no_length_limit(tokenizer):
        while len(crops) < C4_WINDOWS:
            index = draw.randint(0, len(documents) - 1)
            ids = [] if index in too_short else tokenizer(documents[index])["input_ids"]
            if len(ids) >= seq_len:
                start = draw.randint(0, len(ids) - seq_len - 1) if len(ids) > seq_len else 0
                crops.append(ids[start : start + seq_len])
                continue
            too_short.add(index)
            if len(too_short) == len(documents):
                raise ValueError(
                    f"Expected documents of at least seq_len = {seq_len} tokens for protocol 'c4', but got "
                    f"{len(documents)} shorter ones. Give {C4_FILE} of allenai/c4 or a smaller data.seq_len."
                )
    return torch.tensor(crops, dtype=torch.int32)


def c4_new_stream(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> Tensor:
    """Tokenise the text of protocol "c4-new".

    Returns:
        Token ids `[num_tokens]`, int32.

    Raises:
        ValueError: there are fewer than 1100 documents.
    """
    if len(documents) < C4_NEW_DOCUMENTS:
        raise ValueError(
            f"Expected at least {C4_NEW_DOCUMENTS} documents for protocol 'c4-new', but got {len(documents)}. "
            f"Give {C4_FILE} of allenai/c4."
        )
    return stream_of(" ".join(documents[:C4_NEW_DOCUMENTS]), tokenizer)


def _tokens(
    source: TextSource,
    tokenizer: "PreTrainedTokenizerBase",
    cache_dir: Path | None,
    key: list[str],
    make: Callable[[list[str]], Tensor],
) -> Tensor:
    """Return the result of `make` on the documents, from the cache if it is there."""
    if source.cache_key is not None:
        described = [*key, source.cache_key]
        return cached_tokens(described, tokenizer, cache_dir, lambda: make(as_texts(source.documents(), tokenizer)))
    documents = as_texts(source.documents(), tokenizer)
    return cached_tokens([*key, *documents], tokenizer, cache_dir, lambda: make(documents))
