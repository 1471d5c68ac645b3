"""What people read alike in tables, pages and logs: states of a model, and sizes."""

from rich.markup import escape

COMPRESSED_PHASES = {"one_shot": "one-shot", "blockwise": "blockwise", "finetuned": "finetuned"}
HELD_OUT_ERROR = "held_out_error"  # of a block while it is finetuned, as it is logged
PHASES = {"dense": "dense"} | COMPRESSED_PHASES

# By the place of the beginning-of-sequence token, in the words of the protocol.
BEGINNINGS = {
    "stream": "with a beginning-of-sequence token at the very start if the tokenizer has one",
    "window": "with the beginning-of-sequence token in place of the first token of every window",
}


def shown(name: str) -> str:
    r"""Return a name for a table of rich: its brackets are no markup, and its control characters are told by number.

    Example:
        >>> shown("a[/red]\x1b[31m")
        'a\\[/red]\\x1b[31m'
    """
    return escape(printable(name))


def printable(name: str) -> str:
    r"""Return a name whose control characters are told by number.

    Example:
        >>> print(printable("a\x1b[31m"))
        a\x1b[31m
    """
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in name)


def readable(size: float) -> str:
    """Return a size in words.

    Args:
        size: bytes.

    Example:
        >>> readable(3 * 2**19), readable(5 * 2**29)
        ('1.50 MiB', '2.50 GiB')
        >>> readable(577 * 2**20), readable(12.34 * 2**30)
        ('577 MiB', '12.3 GiB')
    """
    value, unit = (size / 2**30, "GiB") if size >= 2**30 else (size / 2**20, "MiB")
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f} {unit}"
