"""Allocation against all combinations."""

from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nowag_pl.functional.allocation import allocate, convex_hull

SETTINGS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60).map(float)), min_size=1, max_size=4)
LINEARS = st.lists(SETTINGS, min_size=1, max_size=5)


def total(choices, chosen, which) -> float:
    return sum(settings[number][which] for settings, number in zip(choices, chosen, strict=True))


def best(choices, budget) -> float:
    """Return the least sum of losses that can be paid, of all combinations."""
    combinations = product(*(range(len(settings)) for settings in choices))
    return min(total(choices, each, 1) for each in combinations if total(choices, each, 0) <= budget)


def largest_step(choices) -> float:
    hulls = [[settings[number][1] for number in convex_hull(settings)] for settings in choices]
    return max((before - after for hull in hulls for before, after in pairwise(hull)), default=0.0)


@settings(max_examples=200, deadline=None)
@given(LINEARS, st.floats(0, 1))
def test_is_within_the_budget_and_a_step_of_the_best_of_all_combinations(choices, share):
    least = sum(min(cost for cost, _ in settings) for settings in choices)
    most = sum(max(cost for cost, _ in settings) for settings in choices)
    budget = least + round(share * (most - least))
    chosen = allocate(choices, budget)
    assert total(choices, chosen, 0) <= budget
    excess, step = total(choices, chosen, 1) - best(choices, budget), largest_step(choices)
    assert excess < step or excess == 0


@settings(max_examples=100, deadline=None)
@given(LINEARS)
def test_is_the_best_where_the_budget_is_what_a_price_asks(choices):
    for price in (0.3, 1.7, 6.1):
        chosen = [min(range(len(own)), key=lambda n, own=own: own[n][1] + price * own[n][0]) for own in choices]
        budget = total(choices, chosen, 0)
        assert total(choices, allocate(choices, budget), 1) == total(choices, chosen, 1) == best(choices, budget)


@given(LINEARS)
def test_everything_is_the_best_where_money_does_not_matter(choices):
    chosen = allocate(choices, 10**6)
    assert total(choices, chosen, 1) == sum(min(loss for _, loss in settings) for settings in choices)


@given(SETTINGS)
def test_hull_falls_ever_more_slowly_and_nothing_is_below_it(choices):
    hull = [choices[number] for number in convex_hull(choices)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull)]
    assert all(slope < 0 for slope in slopes)
    assert all(first < second for first, second in pairwise(slopes))
    for cost, loss in choices:
        for (a, la), (b, lb) in pairwise(hull):
            if a <= cost <= b:
                assert loss >= la + (lb - la) * (cost - a) / (b - a) - 1e-9
    assert hull[-1][1] == min(loss for _, loss in choices)


def test_what_is_left_goes_to_settings_off_the_hull():
    # the hull's only step costs 10; one that is off it costs 3
    assert allocate([[(1, 10.0), (4, 9.0), (11, 0.0)]], budget=5) == [1]


def test_a_step_that_cannot_be_paid_leaves_the_others_theirs():
    choices = [[(1, 100.0), (21, 0.0)], [(1, 5.0), (3, 1.0)]]
    assert allocate(choices, budget=10) == [0, 1]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"Expected a budget of at least 5, the least cost, but got 4\."):
        allocate([[(2, 1.0)], [(3, 1.0), (4, 0.0)]], budget=4)
