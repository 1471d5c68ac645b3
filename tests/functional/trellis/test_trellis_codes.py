import pytest
import torch
from trellis_oracle import value

from nowag_pl.functional.trellis.codes import code_values, initial_table, table_places

COMPUTED = ("mul1", "mcg", "3inst", "1mad")


@pytest.mark.parametrize("code", COMPUTED)
def test_values_are_those_of_a_scalar_decoder(code):
    values = code_values(code, 16)
    for state in (*range(50), *range(0, 2**16, 997), 2**16 - 1):
        assert values[state].item() == pytest.approx(value(code, state), rel=1e-7 if code == "1mad" else 0)


@pytest.mark.parametrize("code", [*COMPUTED, "table"])
@pytest.mark.parametrize("state_bits", [12, 16])
def test_values_look_like_a_gaussian(code, state_bits):
    values = code_values(code, state_bits).double()
    spread = 1.244 if code in ("mcg", "3inst") else 1.0
    assert values.mean().abs() < 0.03
    assert values.std() == pytest.approx(spread, rel=0.04)
    assert (values / values.std()).pow(4).mean() == pytest.approx(3, abs=0.4)


def test_fewer_states_are_the_first_ones():
    assert torch.equal(code_values("mul1", 9), code_values("mul1", 16)[:512])


def test_table_is_looked_up_by_scalar_rule_and_trains():
    table = torch.arange(1.0, 9.0, requires_grad=True)
    values = code_values("table", 16, table)
    for state in range(0, 2**16, 331):
        mixed = state * state + state
        expected = (1 + (mixed >> 12) % 8) * (-1 if mixed >> 15 & 1 else 1)
        assert values[state] == expected
    values.square().sum().backward()
    entry, _ = table_places(16, 3)
    assert torch.equal(table.grad, 2 * table.detach() * entry.bincount(minlength=8))


def test_first_table_is_half_of_a_gaussian():
    table = initial_table(9)
    assert len(table) == 512
    assert table.square().mean() == pytest.approx(1, abs=0.01)
    assert table[0] > 0
    assert (table.diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mul1", 17), r"Expected state_bits in \[4, 16\], but got 17."),
        (("mul1", 12, torch.ones(2)), "Expected a table for the code 'table' only, but got one for 'mul1'."),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ValueError, match=message):
        code_values(*arguments)
