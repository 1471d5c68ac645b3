"""Checks of numbers that a user gives: of the right kind, and in their range."""

import math
from numbers import Integral, Real


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Check a whole number, which true and false are not.

    Args:
        name: of the setting, for the message.
        value: what was given.
        least: the smallest that is fine.
        most: the largest; None: no end.

    Raises:
        ValueError: it is none, or out of its range.

    >>> check_whole("bits", 2.5, 1, 8)
    Traceback (most recent call last):
    ValueError: Expected bits to be a whole number, but got 2.5.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"Expected {name} to be a whole number, but got {value!r}.")
    if int(value) < least or (most is not None and int(value) > most):
        within = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"Expected {name} {within}, but got {value}.")


def check_real(name: str, value: object, least: float = 0.0, most: float = math.inf, above: bool = False) -> None:
    """Check a finite number, which true and false are not.

    Args:
        name: of the setting, for the message.
        value: what was given.
        least: the smallest that is fine.
        most: the largest.
        above: whether it has to be larger than the smallest.

    Raises:
        ValueError: it is none, not finite, or out of its range.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"Expected {name} to be a number, but got {value!r}.")
    number = float(value)
    if not math.isfinite(number) or number < least or number > most or (above and number == least):
        bound = f"above {least:g}" if above else f"of at least {least:g}"
        end = "" if most == math.inf else f" and at most {most:g}"
        raise ValueError(f"Expected {name} {bound}{end}, but got {value}.")
