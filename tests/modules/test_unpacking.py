"""A weight that is unpacked once gives the same results, and follows its linear."""

import copy

import pytest
import torch
from test_acceleration import armor, masked, quantized
from torch import nn

from nowag_pl.modules.running.unpacking import unpack_linears

MAKERS = {"masked": masked, "armor": armor, "quantized": quantized}


def inputs(linear, generator):
    return torch.randn(3, linear.in_features, generator=generator).bfloat16()


@pytest.mark.parametrize("kind", MAKERS)
def test_it_is_reconstructed_once(kind, generator, monkeypatch):
    linear = MAKERS[kind]()
    expected = nn.functional.linear(inputs(linear, generator), linear.weight, linear.bias.bfloat16()).detach()
    before = dict(linear.state_dict())
    assert unpack_linears(nn.Sequential(linear), torch.bfloat16)
    monkeypatch.setattr(type(linear), "weight", property(lambda _: pytest.fail("reconstructed again")))
    generator.manual_seed(0)
    activations = inputs(linear, generator)
    with torch.no_grad():
        assert torch.equal(linear(activations), linear(activations))
        assert linear(activations).shape == expected.shape
    assert linear.state_dict().keys() == before.keys()
    assert linear.held_bytes > linear.out_features * linear.in_features * 2


@pytest.mark.parametrize("kind", MAKERS)
@torch.no_grad()
def test_it_follows_changes_moves_and_types(kind, generator):
    linear = MAKERS[kind](dtype=torch.float32)
    activations = torch.randn(3, linear.in_features, generator=generator)
    linear.unpack(torch.float32)
    other = MAKERS[kind](dtype=torch.float32)
    for each in (linear, other):
        next(iter(each.parameters())).mul_(0.5)
        for name, parameter in each.named_parameters():
            parameter.mul_(2 if name != "bias" else 1)
    torch.testing.assert_close(linear(activations), other(activations), rtol=1e-4, atol=1e-4)
    linear.load_state_dict({name: 0 * tensor for name, tensor in linear.state_dict().items()})
    assert not linear.dense_weight(torch.float32).any()
    copied = copy.deepcopy(other)
    copied.unpack(torch.float32)
    assert copied(activations.bfloat16()).dtype == torch.bfloat16
    copied.double()
    assert copied.dense_weight(torch.float64).dtype == torch.float64
    copied.pack()
    assert not copied.is_unpacked


@pytest.mark.parametrize("kind", MAKERS)
def test_training_does_not_take_it(kind, generator):
    linear = MAKERS[kind](dtype=torch.float32)
    linear.unpack(torch.float32)
    activations = torch.randn(3, linear.in_features, generator=generator, requires_grad=True)
    linear(activations).sum().backward()
    assert all(parameter.grad is not None for parameter in linear.parameters())
    linear.requires_grad_(False)
    linear(activations).sum().backward()
    torch.testing.assert_close(activations.grad, 2 * linear.weight.sum(dim=0).expand(3, -1), rtol=1e-4, atol=1e-4)
