"""Which columns of a table hold its text, and chats as text: through the chat template of the model's tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Document = str | list[Message]
Row = dict[str, Any]

_TEXT = "text"
_CHATS = ("messages", "conversations", "conversation")
# Columns of a request, of the answer to it, and of what the request is about, if any.
_PAIRS = (
    ("instruction", "response", "context"),
    ("instruction", "output", "input"),
    ("prompt", "response", ""),
    ("prompt", "completion", ""),
    ("question", "answer", ""),
    ("problem", "answer", ""),
    ("problem", "solution", ""),
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


def text_columns(columns: Sequence[str], column: str | None, name: str) -> tuple[str, ...]:
    """Return the columns of a table that hold its text.

    Args:
        columns: all its columns.
        column: the one that was asked for. None: "text", or else a known one of chats, or known ones of requests and
            answers.
        name: of the table, for messages.

    Raises:
        ValueError: it has no such columns.

    >>> text_columns(["id", "instruction", "output", "input"], None, "a.jsonl")
    ('instruction', 'output', 'input')
    """
    if column is not None:
        if column not in columns:
            raise ValueError(f"Expected {name} to have a column {column!r}, but got {_listed(columns)}.")
        return (column,)
    for known in (_TEXT, *_CHATS):
        if known in columns:
            return (known,)
    for request, answer, about in _PAIRS:
        if request in columns and answer in columns:
            return (request, answer, about) if about in columns else (request, answer)
    raise ValueError(
        f"Expected {name} to have a column {_TEXT!r} or one of chats ({', '.join(_CHATS[:2])}, or instruction and "
        f"response), but got {_listed(columns)}. Name the right one as column."
    )


def _listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    return f"{[column[:40] for column in columns[:20]]}{more}"


def document_of(row: Mapping[str, Any], columns: Sequence[str], name: str, index: int) -> Document:
    """Return the text or the chat in a row.

    Args:
        row: its columns.
        columns: result of :func:`text_columns`.
        name: of the table, for messages.
        index: number of the row, for messages.

    Raises:
        ValueError: it holds something else.
    """
    values = [row[column] for column in columns]
    if len(columns) > 1:
        request, answer, *about = values
        if not isinstance(request, str) or not isinstance(answer, str):
            raise ValueError(f"Expected text in columns {list(columns[:2])} of {name}, but not so in row {index}.")
        request = "\n\n".join([request, *(text for text in about if text)])
        return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    value = values[0]
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return [_message(message, columns[0], name, index) for message in value]
    if not isinstance(value, str):
        raise ValueError(
            f"Expected text, or a chat of messages, in column {columns[0]!r} of {name}, but row {index} holds "
            f"{type(value).__name__}."
        )
    return value


def _message(message: Mapping[str, Any], column: str, name: str, index: int) -> Message:
    """Return a message by role and content, which ShareGPT calls from and value."""
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or content is None:
        raise ValueError(
            f"Expected messages with role and content, or from and value, in column {column!r} of {name}, but row "
            f"{index} holds one with {sorted(message)}."
        )
    return {"role": _ROLES.get(role, role), "content": content}


def as_texts(documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return documents as texts: chats as the model's chat template writes them.

    Args:
        documents: texts and chats.
        tokenizer: the model's.

    Raises:
        ValueError: it has no template, or its template refuses a chat.
    """
    return [
        document if isinstance(document, str) else _written(document, tokenizer, index)
        for index, document in enumerate(documents)
    ]


def _written(chat: list[Message], tokenizer: "PreTrainedTokenizerBase", index: int) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "Expected a model with a chat template (chat_template in tokenizer_config.json) for a table of chats, but "
            "its tokenizer has none. Give text, or name a column of text as column."
        )
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0][:200].rstrip(".")
        raise ValueError(
            f"Expected chats that the model's chat template takes, but it refuses chat {index}, whose roles are "
            f"{[message['role'] for message in chat][:8]}: {reason}."
        ) from error
