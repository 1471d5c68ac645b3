"""Routed experts compute what a loop over tokens does, whatever the layout of the fused tensors they come from."""

import pytest
import torch
from torch import nn

from nowag_pl.modules.experts import ExpertSizes, Place, RoutedExperts, ScaledExperts


def gating(gate, up):
    return up.relu() if gate is None else gate.sigmoid() * up


def experts_of(kind=RoutedExperts, count=4, has_gate=True, has_bias=False) -> RoutedExperts:
    torch.manual_seed(0)
    return kind(count, ExpertSizes(6, 5, has_gate, has_bias), gating, {})


def one_by_one(experts, hidden, index, weights):
    """Every token through its own experts, alone."""
    rows = []
    for token, chosen, scale in zip(hidden, index.tolist(), weights, strict=True):
        total = torch.zeros(6)
        for number, weight in zip(chosen, scale, strict=True):
            own = experts[number]
            gate = None if own.gate_proj is None else own.gate_proj(token)
            total = total + weight * own.down_proj(gating(gate, own.up_proj(token)))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(("has_gate", "has_bias"), [(True, False), (True, True), (False, True)])
def test_every_token_gets_its_experts(has_gate, has_bias):
    experts = experts_of(has_gate=has_gate, has_bias=has_bias)
    hidden = torch.randn(9, 6)
    index = torch.stack([torch.randperm(3)[:2] for _ in range(9)])  # none goes to the last expert
    weights = torch.rand(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(experts(hidden, index, weights), one_by_one(experts, hidden, index, weights))


def test_scaled_experts_leave_rows_of_zeros_out():
    experts, hidden = experts_of(ScaledExperts, has_bias=True), torch.randn(4, 3, 6)
    hidden[0, 1] = hidden[2] = 0
    seen = []
    experts[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        output = experts(hidden.view(12, 6)).view(4, 3, 6)
        expected = torch.stack([experts[number](hidden[number]) for number in range(4)])
    expected[0, 1] = expected[2] = 0
    torch.testing.assert_close(output, expected)
    assert torch.equal(seen[0], hidden[0, [0, 2]])
    assert torch.equal(experts.entering(hidden.view(12, 6)), hidden.view(12, 6)[[0, 2, 3, 4, 5, 9, 10, 11]])


def test_only_experts_with_tokens_are_called():
    experts, calls = experts_of(), []
    for number, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, args, number=number: calls.append((number, len(args[0]))))
    with torch.no_grad():
        experts(torch.randn(3, 6), torch.tensor([[2], [0], [2]]), torch.ones(3, 1))
    assert calls == [(0, 1), (2, 2)]


@pytest.mark.parametrize("kind", [RoutedExperts, ScaledExperts])
def test_experts_without_tokens_get_gradients_of_zero(kind):
    # So that processes whose tokens go to other experts can average gradients.
    experts, hidden = experts_of(kind), torch.randn(4, 6)
    routed = (torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1))
    arguments = (hidden, *routed) if kind is RoutedExperts else (hidden * torch.tensor([[1.0], [0], [0], [0]]),)
    experts(*arguments).sum().backward()
    gradients = [sum(each.grad.abs().sum() for each in expert.parameters()) for expert in experts]
    assert gradients[0] > 0
    assert gradients[1:] == [0, 0, 0]


PLACES = [
    (Place("gate_up_proj", 1, 0), lambda fused: fused[1, :3]),
    (Place("gate_up_proj", 1, 1), lambda fused: fused[1, 3:]),
    (Place("gate_up_proj", 0, 0, is_concatenated=False), lambda fused: fused[0, ::2]),
    (Place("gate_up_proj", 0, 1, True, False), lambda fused: fused[0, :, 1::2].T),
    (Place("down_proj", 1, None, True), lambda fused: fused[1].T),
]


@pytest.mark.parametrize(("place", "expected"), PLACES)
def test_places_in_fused_tensors(place, expected):
    fused = torch.arange(2 * 6 * 6.0).view(2, 6, 6)
    own = place.take(fused[place.expert])
    assert torch.equal(own, expected(fused))
    assert own.is_contiguous()
    again = torch.zeros_like(fused)
    place.put(again, own)
    assert torch.equal(expected(again), own)
    assert again.sum() == own.sum()
    assert place.fused_shape((3, 6) if place.part is not None else (6, 6), 2) == [2, 6, 6]


def test_experts_are_a_list_of_linears():
    names = [name for name, each in experts_of(count=2).named_modules() if isinstance(each, nn.Linear)]
    assert names == [f"{number}.{each}_proj" for number in range(2) for each in ("gate", "up", "down")]
