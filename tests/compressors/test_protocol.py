import pytest
import torch
from torch import nn

from nowag_pl.compressors import Compressor, MagnitudePruner, NoWagPruner, NoWagQuantizer, WandaPruner

COMPRESSORS = [
    MagnitudePruner(),
    WandaPruner(pattern=(2, 4)),
    NoWagPruner(),
    NoWagPruner(structured="rows"),
    NoWagQuantizer(subvector_dim=3, codebook_size=4),
]
parametrize = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)


def make_linear(bias=True, dtype=torch.float32, out_features=6, in_features=8):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear, torch.rand(in_features, generator=generator) + 0.1


@parametrize
def test_keeps_the_protocol(compressor):
    assert isinstance(compressor, Compressor)
    assert eval(repr(compressor)) == compressor


@parametrize
def test_inputs_stay(compressor):
    linear, second_moment = make_linear()
    before = linear.weight.clone(), linear.bias.clone(), second_moment.clone()
    compressed = compressor.compress(linear, second_moment)
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, (linear.weight, linear.bias, second_moment)))
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad


@parametrize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_types_are_kept_and_all_can_be_trained(compressor, dtype):
    linear, second_moment = make_linear(dtype=dtype)
    compressed = compressor.compress(linear, second_moment)
    assert torch.equal(compressed.bias, linear.bias)
    assert compressed.weight.dtype == dtype
    assert compressed.weight.shape == linear.weight.shape
    assert compressed(torch.ones(2, 8, dtype=dtype)).dtype == dtype
    assert all(parameter.requires_grad for parameter in compressed.parameters())
    assert compressor.compress(*make_linear(bias=False)).bias is None


@parametrize
def test_what_is_not_finite_is_refused_and_counted(compressor):
    for bad in (float("nan"), float("inf"), float("-inf")):
        linear, second_moment = make_linear()
        second_moment[3] = bad
        with pytest.raises(ValueError, match="Expected finite second moments, but got 1 NaN or infinite"):
            compressor.compress(linear, second_moment)
        linear.weight.data[1, 2:4] = bad
        with pytest.raises(ValueError, match="Expected finite weights, but got 2 NaN or infinite"):
            compressor.compress(linear, torch.ones(8))


@parametrize
def test_second_moments_below_zero_or_of_another_shape_are_refused(compressor):
    linear, second_moment = make_linear()
    for shape in ((7,), (1,), (1, 8), ()):
        with pytest.raises(ValueError, match="for each of 8 input features, but got shape"):
            compressor.compress(linear, torch.ones(shape))
    second_moment[3] = -0.5
    with pytest.raises(ValueError, match=r"second moments of at least 0, but got -0\.5"):
        compressor.compress(linear, second_moment)


@parametrize
def test_dead_channels_and_zero_weights_give_finite_results(compressor):
    linear, second_moment = make_linear()
    second_moment[:4] = 0
    linear.weight.data[:, 5] = 0
    linear.weight.data[2] = 0
    for moments in (second_moment, torch.zeros(8)):
        assert compressor.compress(linear, moments).weight.isfinite().all()
