"""The budget of length against its formulas, number by number."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.length_budget import LengthBudget, length_cost, shaped_rewards, updated_price

BUDGET = LengthBudget(10, rate=0.02, ceiling=0.15, cap=0.4, hit=0.1)


def test_rewards_are_those_of_the_formula():
    lengths, rewards, price = [1, 10, 13, 40, 64], [1.0, 0.1, 0.9, 1.0, 0.0], 0.15
    found = shaped_rewards(torch.tensor(rewards).double(), torch.tensor(lengths), price, BUDGET, 64)
    for reward, length, value in zip(rewards, lengths, found.tolist(), strict=True):
        loss = min(price * max(0, (length - 10) / 10), 0.4) + (0.1 if length == 64 else 0)
        assert value == pytest.approx(reward - loss, abs=1e-6)


def test_cost_is_zero_up_to_the_budget_and_a_share_of_it_above():
    assert length_cost(torch.tensor([1, 10, 15, 30]), BUDGET).tolist() == [0.0, 0.0, 0.5, 2.0]


@given(price=st.floats(0, 0.15), length=st.floats(0, 1000))
def test_price_follows_the_signed_mean_between_zero_and_ceiling(price, length):
    found = updated_price(price, length, BUDGET)
    assert 0 <= found <= 0.15
    if 0 < found < 0.15:
        assert found == pytest.approx(price + 0.02 * (length / 10 - 1))
    assert (found >= price) == (length >= 10 or price == found)


def test_price_falls_to_zero_where_the_budget_is_loose():
    price = 0.15
    for _ in range(20):
        price = updated_price(price, 5.0, BUDGET)
    assert price == 0.0


def test_nothing_costs_at_a_price_of_zero():
    rewards = torch.tensor([0.3, 1.0]).double()
    assert torch.equal(shaped_rewards(rewards, torch.tensor([500, 900]), 0.0, BUDGET, 1000), rewards)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "budget.tokens of at least 1"),
        ({"tokens": 5, "rate": 0.0}, "budget.rate above 0"),
        ({"tokens": 5, "ceiling": -1.0}, "budget.ceiling of at least 0"),
        ({"tokens": 5, "cap": float("nan")}, "budget.cap"),
    ],
)
def test_budget_refuses_what_is_none(settings, message):
    with pytest.raises(ValueError, match=message):
        LengthBudget(**settings)
