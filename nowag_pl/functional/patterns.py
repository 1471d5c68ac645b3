"""Patterns (N, M): N kept of every M consecutive weights of a row."""

from collections.abc import Sequence


def check_row(num_columns: int, pattern: tuple[int, int]) -> None:
    """Raise ValueError unless the groups of a pattern (N, M) fill a row."""
    if num_columns % pattern[1]:
        raise ValueError(
            f"Expected a number of input features divisible by {pattern[1]} for the pattern {pattern[0]}:{pattern[1]}, "
            f"but got {num_columns}."
        )


def as_pattern(given: object) -> tuple[int, int]:
    """Return a pattern (N, M) out of any list of two.

    Raises:
        ValueError: it is none.
    """
    pattern = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else given
    check_pattern(pattern)  # type: ignore[arg-type]
    return pattern  # type: ignore[return-value]


def check_pattern(pattern: tuple[int, int]) -> None:
    """Raise ValueError unless the pattern is (N, M), two whole numbers with 1 <= N <= M."""
    numbers = pattern if isinstance(pattern, tuple) else ()
    whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    if len(numbers) != 2 or len(whole) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(
            f"Expected a pattern (N, M), N kept of every M weights, with 1 <= N <= M, but got {pattern!r}."
        )
