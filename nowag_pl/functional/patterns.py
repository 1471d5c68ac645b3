"""Patterns (N, M): N kept of every M consecutive weights of a row."""


def check_row(num_columns: int, pattern: tuple[int, int]) -> None:
    """Raise ValueError unless the groups of a pattern (N, M) fill a row."""
    if num_columns % pattern[1]:
        raise ValueError(
            f"Expected a number of input features divisible by {pattern[1]} for the pattern {pattern[0]}:{pattern[1]}, "
            f"but got {num_columns}."
        )


def check_pattern(pattern: tuple[int, int]) -> None:
    """Raise ValueError unless the pattern is (N, M) with 1 <= N <= M."""
    num_kept, group_size = pattern
    if not 1 <= num_kept <= group_size:
        raise ValueError(
            f"Expected a pattern (N, M), N kept of every M weights, with 1 <= N <= M, but got {tuple(pattern)}."
        )
