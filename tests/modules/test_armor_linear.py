import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nowag_pl.functional.armor.objective import ArmorFactors
from nowag_pl.functional.pruning import keep_n_of_m
from nowag_pl.modules import ArmorLinear, CompressedLinear

DTYPES = [torch.float32, torch.bfloat16]


def make(rows=6, columns=8, out_block=3, in_block=4, pattern=(2, 4), dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keep = keep_n_of_m(normal(rows, columns), pattern)
    factors = ArmorFactors(
        normal(rows // out_block, out_block, out_block),
        normal(rows, columns) * keep,
        keep,
        normal(columns // in_block, in_block, in_block),
    )
    return ArmorLinear(factors, pattern, normal(rows).to(dtype) if bias else None, dtype), factors


def restored(module):
    copy = CompressedLinear.from_description(json.loads(json.dumps(module.description())))
    copy.load_state_dict(module.storage())
    return copy


@pytest.mark.parametrize(
    ("pattern", "out_block", "in_block"), [((1, 4), 3, 4), ((2, 4), 1, 8), ((3, 4), 6, 8), ((4, 8), 2, 2)]
)
def test_weight_is_the_dense_product_of_rounded_factors(out_block, in_block, pattern):
    module, factors = make(out_block=out_block, in_block=in_block, pattern=pattern)
    left, core, right = (tensor.half().float() for tensor in (factors.out_factor, factors.core, factors.in_factor))
    torch.testing.assert_close(module.weight, torch.block_diag(*left) @ core @ torch.block_diag(*right))
    assert torch.equal(module.core, core)
    assert torch.equal(module.keep, factors.keep)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_forward_is_linear(dtype, tolerance, bias, generator):
    module, _ = make(dtype=dtype, bias=bias)
    activations = torch.randn(2, 3, 8, generator=generator)
    output = module(activations.to(dtype))
    expected = F.linear(activations, module.weight.float(), module.bias.float() if bias else None)
    assert module.weight.dtype == output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=tolerance * float(expected.abs().max()), rtol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_output_has_the_type_of_the_activations(bias):
    module, _ = make(dtype=torch.bfloat16, bias=bias)
    assert module(torch.ones(2, 8)).dtype == torch.float32


def test_output_under_autocast_has_its_type():
    module, _ = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(torch.ones(2, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "pattern", "out_block"), [(True, (2, 4), 3), (False, (3, 4), 1), (True, (4, 8), 6)])
def test_storage_round_trip(dtype, bias, pattern, out_block):
    module, _ = make(dtype=dtype, bias=bias, pattern=pattern, out_block=out_block)
    copy = restored(module)
    assert torch.equal(copy.weight, module.weight)
    assert copy.weight.dtype == dtype
    assert torch.equal(copy.mask, module.mask)
    assert (copy.bias is None) == (module.bias is None)
    assert not bias or torch.equal(copy.bias, module.bias)
    assert copy.description() == module.description()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)],
)
def test_state_is_sixteen_bits_and_packed_bytes(dtype, stored):
    module, _ = make(dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}  # one type: FSDP2 asks for it
    assert {name: tensor.dtype for name, tensor in module.storage().items()} == {
        "out_factor": stored,
        "in_factor": stored,
        "values": stored,
        "mask": torch.uint8,
        "bias": dtype,
    }


@pytest.mark.parametrize(
    ("pattern", "out_block", "in_block"), [((2, 4), 3, 4), ((1, 4), 6, 8), ((4, 8), 2, 8), ((2, 4), 1, 4)]
)
def test_bits_per_weight_is_what_is_stored(pattern, out_block, in_block):
    module, _ = make(pattern=pattern, out_block=out_block, in_block=in_block)
    assert 0 <= module.storage_bytes * 8 - module.bits_per_weight * 48 < 8 - 1e-6
    assert module.sparsity == 1 - pattern[0] / pattern[1]


def test_gradients_reach_everything_but_the_mask(generator):
    module, factors = make()
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 8, generator=generator)).square().sum().backward()
    optimizer.step()
    assert set(before) == {"out_factor", "in_factor", "values", "bias"}
    assert all((parameter != before[name]).all() for name, parameter in module.named_parameters())
    assert torch.equal(module.keep, factors.keep)
    assert (module.core[~factors.keep] == 0).all()
    assert set(module.fixed()) == {"mask"}
    assert torch.equal(restored(module).values, module.values.half().float())


def test_gradients_of_forward_and_weight_agree(generator):
    activations, gradients = torch.randn(4, 8, generator=generator), []
    for function in (lambda module: module(activations), lambda module: F.linear(activations, module.weight)):
        module, _ = make(bias=False)
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        function(module).square().sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("name", "field", "size"), [("left", "out_factor", 6), ("right", "in_factor", 8)])
@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 3), (8, 8)])
def test_factors_of_other_shapes_are_refused(name, field, size, shape):
    _, factors = make()
    with pytest.raises(ValueError, match=rf"the {name} factor with {size} rows in all, but got shape \({shape[0]}, "):
        ArmorLinear(factors._replace(**{field: torch.zeros(shape)}), (2, 4))


def test_mask_without_the_pattern_is_refused():
    _, factors = make()
    with pytest.raises(ValueError, match="2 kept of every 4"):
        ArmorLinear(factors._replace(keep=torch.ones(6, 8, dtype=torch.bool)), (2, 4))


@pytest.mark.parametrize("field", ["out_factor", "core", "in_factor"])
def test_values_that_sixteen_bits_do_not_hold_are_refused(field):
    _, factors = make()
    with pytest.raises(ValueError, match="factors and values under 65504"):
        ArmorLinear(factors._replace(**{field: getattr(factors, field) * 1e6}), (2, 4))


def test_module_is_made_of_parameters_alone():
    module, _ = make()
    assert {name: type(parameter) for name, parameter in module.named_parameters()} == dict.fromkeys(
        ("bias", "out_factor", "in_factor", "values"), nn.Parameter
    )
