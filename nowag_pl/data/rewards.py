"""Rewards: how right an answer is, by its text. Each is chosen by its class_path; your own derives from `Reward`."""

import re
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any

from nowag_pl.functional.ranges import check_real

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_BOX = r"\boxed{"


class Reward(ABC):
    """A number for each answer, best between 0 and 1.

    Args:
        weight: its factor in the sum of all rewards.
    """

    def __init__(self, weight: float = 1.0) -> None:
        check_real("weight of a reward", weight)
        self.weight = weight

    @abstractmethod
    def score(self, answer: str, wanted: str) -> float:
        """Return the reward of an answer.

        Args:
            answer: text that the model has written, without special tokens.
            wanted: the right answer, as the data gives it.
        """

    def settings(self) -> dict[str, Any]:
        """Return the JSON values on which the rewards depend."""
        return {"class": type(self).__name__, **vars(self)}


class ExactNumber(Reward):
    r"""1 if the number in the last box, or the last one of the last line, is that of the right answer; otherwise 0.

    A box is LaTeX's `\boxed{...}`. Numbers are compared exactly: 1,200 is 1200.0, and 3/4 is 0.75.
    """

    def score(self, answer: str, wanted: str) -> float:
        """Return 1 or 0.

        Raises:
            ValueError: the right answer has no number.
        """
        right = final_number(wanted)
        if right is None:
            raise ValueError(f"Expected a number in the right answer, but got {wanted[:100]!r}.")
        return float(final_number(answer) == right)


class MultipleChoice(Reward):
    """1 if the last of the letters in the last box, or in the last line, is that of the right answer; otherwise 0.

    Args:
        letters: the choices.
        weight: factor in the sum of all rewards.
    """

    def __init__(self, letters: str = "ABCDE", weight: float = 1.0) -> None:
        super().__init__(weight)
        if not letters.isalpha():
            raise ValueError(f"Expected letters of a multiple choice, such as ABCD, but got {letters!r}.")
        self.letters = letters

    def score(self, answer: str, wanted: str) -> float:
        """Return 1 or 0.

        Raises:
            ValueError: the right answer is none of the letters.
        """
        right = self._choice(wanted)
        if right is None:
            raise ValueError(f"Expected one of {self.letters} as the right answer, but got {wanted[:100]!r}.")
        return float(self._choice(answer) == right)

    def _choice(self, text: str) -> str | None:
        found = re.findall(rf"(?<!\w)([{self.letters}])(?!\w)", final_part(text))
        return found[-1] if found else None


class RegularExpression(Reward):
    """1 if the last match of a pattern is the right answer, without spaces around it; otherwise 0.

    Args:
        pattern: regular expression; its first group is compared, or all of it where it has no group.
        weight: factor in the sum of all rewards.
    """

    def __init__(self, pattern: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        _check_pattern(pattern)
        self.pattern = pattern

    def score(self, answer: str, wanted: str) -> float:
        """Return 1 or 0."""
        matches = list(re.finditer(self.pattern, answer, re.MULTILINE))
        if not matches:
            return 0.0
        found = matches[-1][1 if matches[-1].re.groups else 0]
        return float((found or "").strip() == wanted.strip())


class Format(Reward):
    r"""1 if an answer has a form, whatever it says; otherwise 0.

    Args:
        pattern: regular expression that the whole answer has to match; a dot matches line ends, too.
        weight: factor in the sum of all rewards.
    """

    def __init__(self, pattern: str = r".*\\boxed\{.+\}.*", weight: float = 0.1) -> None:
        super().__init__(weight)
        _check_pattern(pattern)
        self.pattern = pattern

    def score(self, answer: str, wanted: str) -> float:
        """Return 1 or 0."""
        return float(re.fullmatch(self.pattern, answer, re.DOTALL) is not None)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"Expected a regular expression, but got {pattern!r}: {error}.") from error


def final_part(text: str) -> str:
    r"""Return what stands in the last box of a text, or its last line that is not blank.

    >>> final_part("so \\boxed{\\frac{1}{2}} it is"), final_part("7 + 5\nis 12\n")
    ('\\frac{1}{2}', 'is 12')
    """
    start = text.rfind(_BOX)
    if start >= 0:
        depth, begin = 1, start + len(_BOX)
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[begin:place]
    lines = text.split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def final_number(text: str) -> Fraction | None:
    """Return the last number of :func:`final_part`; None where there is none.

    >>> final_number("So it is 1,200.50 dollars."), final_number("I do not know.")
    (Fraction(2401, 2), None)
    """
    found = _NUMBER.findall(_FRACTION.sub(r"\1/\2", final_part(text)))
    if not found:
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", found[-1]))
    except ZeroDivisionError:
        return None


def total_reward(rewards: list[Reward], answer: str, wanted: str) -> tuple[float, float]:
    """Return the weighted sum of all rewards of an answer, and the first reward alone, which says whether it is right.

    Args:
        rewards: at least one.
        answer: text of the model.
        wanted: the right answer.

    Raises:
        ValueError: a reward raises, or gives something else than a finite number.
    """
    scores = []
    for reward in rewards:
        name = type(reward).__name__
        try:
            score = float(reward.score(answer, wanted))
            check_real(f"the reward of {name}", score, least=-1e30)
        except Exception as error:  # that of a user may raise anything
            raise ValueError(f"{name} gave no reward ({type(error).__name__}: {error})") from error
        scores.append(score)
    return sum(reward.weight * score for reward, score in zip(rewards, scores, strict=True)), scores[0]
