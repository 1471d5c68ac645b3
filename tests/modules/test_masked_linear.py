import json

import pytest
import torch
import torch.nn.functional as F

from nowag_pl.modules import CompressedLinear, MaskedLinear

DTYPES = [torch.float32, torch.bfloat16]


def random_keep(rows, columns, pattern=None):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(1))
    if pattern is None:
        return scores > 0.4
    groups = scores.view(rows, -1, pattern[1])
    return (groups.argsort(dim=2).argsort(dim=2) < pattern[0]).view(rows, columns)


def make(dtype=torch.float32, pattern=None, bias=True, columns=8):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, columns, generator=generator).to(dtype)
    keep = random_keep(5, columns, pattern)
    bias_values = torch.randn(5, generator=generator).to(dtype) if bias else None
    return weight, keep, MaskedLinear(weight, keep, bias_values, pattern)


def restored(module):
    copy = CompressedLinear.from_description(json.loads(json.dumps(module.description())))
    copy.load_state_dict(module.storage())
    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", [None, (1, 4), (3, 4), (4, 8)])
def test_weight_is_the_dense_one_where_kept(dtype, pattern):
    weight, keep, module = make(dtype, pattern)
    assert torch.equal(module.keep, keep)
    assert torch.equal(module.weight, torch.where(keep, weight, torch.zeros_like(weight)))
    assert module.weight.dtype == dtype
    assert module.sparsity == pytest.approx(1 - keep.sum().item() / keep.numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_linear(dtype, bias, generator):
    weight, keep, module = make(dtype, bias=bias)
    activations = torch.randn(2, 3, 8, generator=generator).to(dtype)
    output = module(activations)
    assert output.dtype == dtype
    assert torch.equal(output, F.linear(activations, weight * keep, module.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_output_has_the_type_of_the_activations(bias):
    _, _, module = make(torch.bfloat16, bias=bias)
    assert module(torch.ones(2, 8, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bias"), list(zip(DTYPES, (True, False), strict=True)))
@pytest.mark.parametrize("pattern", [None, (1, 4), (3, 4), (4, 8)])
def test_storage_round_trip(dtype, pattern, bias):
    _, _, module = make(dtype, pattern, bias)
    copy = restored(module)
    assert torch.equal(copy.weight, module.weight)
    assert torch.equal(copy.keep, module.keep)
    assert copy.pattern == module.pattern
    assert (copy.bias is None) == (module.bias is None)
    assert bias is False or torch.equal(copy.bias, module.bias)
    assert copy.description() == module.description()


def test_storage_round_trip_keeps_the_type_of_the_bias():
    bias = torch.tensor([1.0, 1.001])
    module = MaskedLinear(torch.ones(2, 4, dtype=torch.bfloat16), random_keep(2, 4), bias)
    copy = restored(module)
    assert copy.bias.dtype == torch.float32
    assert torch.equal(copy.bias, bias)


@pytest.mark.parametrize("num_kept", [0, 40])
def test_nothing_and_all_kept(num_kept):
    keep = (torch.arange(40) < num_kept).view(5, 8)
    module = MaskedLinear(torch.full((5, 8), 2.0), keep)
    assert restored(module).weight.sum() == 2 * num_kept
    assert module.sparsity == 1 - num_kept / 40


def test_no_integers_wider_than_bytes_are_held():
    _, _, module = make(pattern=(2, 4))
    assert {name: buffer.dtype for name, buffer in module.named_buffers()} == {"mask": torch.uint8}


@pytest.mark.parametrize("pattern", [None, (1, 4), (3, 4)])
def test_bits_per_weight_is_what_is_stored(pattern):
    _, keep, module = make(torch.bfloat16, pattern)
    expected_values = 2 * int(keep.sum())
    assert module.storage_bytes == expected_values + module.mask.nbytes
    assert 0 <= module.storage_bytes * 8 - module.bits_per_weight * 40 < 8


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_training_with_weight_decay_moves_only_kept_weights(pattern, generator):
    _, keep, module = make(pattern=pattern)
    before = module.weight.detach().clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(4, 8, generator=generator)).square().sum().backward()
        optimizer.step()
    after = module.weight
    assert (after[~keep] == 0).all()
    assert (after[keep] != before[keep]).all()
    assert torch.equal(module.keep, keep)


def test_gradient_of_the_values_is_that_of_the_dense_weight(generator):
    weight, keep, module = make()
    activations = torch.randn(4, 8, generator=generator)
    dense = (weight * keep).requires_grad_()
    F.linear(activations, dense, module.bias.detach()).square().sum().backward()
    module(activations).square().sum().backward()
    torch.testing.assert_close(module.values.grad, dense.grad[keep])
    assert module.bias.grad is not None


def test_dense_weight_and_bias_are_not_shared():
    weight, keep, module = make()
    before = weight.clone()
    with torch.no_grad():
        module.values.zero_()
        module.bias.zero_()
    assert torch.equal(weight, before)
    bias = torch.ones(5)
    MaskedLinear(weight, keep, bias).bias.data.zero_()
    assert bias.tolist() == [1.0] * 5


def test_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"mask of shape \(5, 8\), but got \(5, 4\)"):
        MaskedLinear(torch.ones(5, 8), torch.ones(5, 4, dtype=torch.bool))


def test_mask_that_breaks_the_pattern_is_refused():
    with pytest.raises(ValueError, match="3 kept of every 4"):
        MaskedLinear(torch.ones(5, 8), random_keep(5, 8, (1, 4)), pattern=(3, 4))


def test_pattern_whose_groups_would_cross_rows_is_refused():
    keep = torch.tensor([[True, True, False, False, True, False], [True, False, True, False, True, False]])
    with pytest.raises(ValueError, match=r"of every 4 weights|divisible by 4"):
        MaskedLinear(torch.ones(2, 6), keep, pattern=(2, 4))
