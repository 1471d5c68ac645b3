"""Rewards of answers by their text."""

import pytest

from nowag_pl.data.rewards import ExactNumber, Format, MultipleChoice, RegularExpression, Reward, total_reward


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        (r"First 3, then \boxed{1,200}. Not 7.", "1200.0", 1),
        (r"\boxed{5} or rather \boxed{\frac{3}{4}}", "0.75", 1),
        ("7+5=12\n8+4+1=13\n132", "132", 1),
        ("The answer is 132\nas 7 + 5 is 12", "132", 0),
        ("so -4", "4", 0),
        ("$12.50", "It costs 25 / 2", 1),
        ("I do not know", "1", 0),
        (r"\boxed{none} 3", "3", 0),
        ("1/0", "1", 0),
        (r"\boxed{3", "3", 1),
        ("", "3", 0),
    ],
)
def test_exact_number_is_that_of_the_last_box_or_line(answer, wanted, expected):
    assert ExactNumber().score(answer, wanted) == expected


@pytest.mark.parametrize(
    ("answer", "wanted", "expected"),
    [
        ("A is wrong.\nSo it is (C).", "C", 1),
        (r"\boxed{B} and not A", "B. because", 1),
        ("Because", "B", 0),
        ("A or B", "A", 0),
    ],
)
def test_multiple_choice_is_the_last_letter_alone(answer, wanted, expected):
    assert MultipleChoice("ABCD").score(answer, wanted) == expected


def test_regular_expression_compares_the_first_group_of_the_last_match():
    reward = RegularExpression(r"answer: (\w+)")
    answers = ("answer: no\nanswer: yes ", "answer: yes\nanswer: no", "yes")
    assert [reward.score(answer, "yes") for answer in answers] == [1, 0, 0]
    assert RegularExpression("yes|no").score("yes no", "no") == 1


def test_format_is_of_the_whole_answer():
    reward = Format(r"(\d\n)*\d+")
    assert [reward.score(answer, "anything") for answer in ("1\n2\n33", "1\n2\n33 ", "x")] == [1, 0, 0]
    assert Format().score("so\n\\boxed{3}.", "") == 1


def test_rewards_are_weighted_and_the_first_says_what_is_right():
    rewards = [ExactNumber(weight=0.9), Format(r"\d+", weight=0.1)]
    assert total_reward(rewards, "12", "12") == (pytest.approx(1.0), 1.0)
    assert total_reward(rewards, "12.", "13") == (0.0, 0.0)


class Broken(Reward):
    def __init__(self, found) -> None:
        super().__init__()
        self.found = found

    def score(self, answer, wanted):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [(float("nan"), "Broken gave no reward .*nan"), (KeyError("x"), "KeyError: 'x'"), ("no", "could not convert")],
)
def test_reward_that_is_none_is_named(found, message):
    with pytest.raises(ValueError, match=message):
        total_reward([ExactNumber(), Broken(found)], "1", "1")


def test_data_without_a_right_answer_is_refused():
    with pytest.raises(ValueError, match="number in the right answer"):
        ExactNumber().score("1", "none")
    with pytest.raises(ValueError, match="Expected one of ABCDE as the right answer"):
        MultipleChoice().score("A", "none of these")


@pytest.mark.parametrize("kind", [RegularExpression, Format])
def test_pattern_that_is_none_is_refused(kind):
    with pytest.raises(ValueError, match="Expected a regular expression"):
        kind("(")
