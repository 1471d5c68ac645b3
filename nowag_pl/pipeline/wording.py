"""What people read alike in tables, pages and logs: states of a model, and sizes."""

COMPRESSED_PHASES = {"one_shot": "one-shot", "blockwise": "blockwise", "finetuned": "finetuned"}
PHASES = {"dense": "dense"} | COMPRESSED_PHASES


def readable(size: float) -> str:
    """Return a size in words.

    Args:
        size: bytes.

    Example:
        >>> readable(3 * 2**19), readable(5 * 2**29)
        ('1.50 MiB', '2.50 GiB')
    """
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
