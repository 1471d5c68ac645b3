import logging
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_armor_linear import make as make_armor
from test_masked_linear import random_keep
from torch import nn
from torch.sparse import SparseSemiStructuredTensor, SparseSemiStructuredTensorCUTLASS

from nowag_pl import accelerate
from nowag_pl.kernels import dispatch
from nowag_pl.modules import (
    ArmorLinear,
    CompressedLinear,
    LookupLinear,
    MaskedLinear,
    SemiStructuredArmorLinear,
    SemiStructuredLinear,
    VQLinear,
)
from nowag_pl.modules.running import acceleration

needs_numba = pytest.mark.skipif(not dispatch.has_module("numba"), reason="Numba is an extra")


def masked(rows=64, columns=128, pattern=(2, 4), dtype=torch.bfloat16, bias=True, device="cpu"):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :8] = 0  # kept zeros are kept
    bias_values = torch.arange(rows, dtype=torch.float32) if bias else None
    return MaskedLinear(weight, random_keep(rows, columns, pattern), bias_values, pattern).to(device)


def armor(rows=64, columns=128, pattern=(2, 4), dtype=torch.bfloat16, bias=True, device="cpu"):
    linear, _ = make_armor(rows, columns, out_block=16, in_block=8, pattern=pattern, dtype=dtype, bias=bias)
    linear.values.data[:4] = 0  # kept zeros are kept
    return linear.to(device)


SPARSE = {"masked": (masked, SemiStructuredLinear), "armor": (armor, SemiStructuredArmorLinear)}


@pytest.fixture
def sparse_cores(monkeypatch):
    """Torch's own conversion for CUTLASS runs on a CPU; only the product, which has no CPU kernel, is replaced."""
    products = []

    def multiply(self, other, *, bias=None, should_transpose_dense=False):
        products.append(self.shape)
        product = self.to_dense() @ (other.T if should_transpose_dense else other)
        product = product if bias is None else product + bias[:, None]
        return product.T if should_transpose_dense else product

    cutlass = SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", True)
    monkeypatch.setattr(cutlass, "_validate_device_dim_dtype_shape", classmethod(lambda cls, weight: None))
    monkeypatch.setattr(cutlass, "_mm", multiply)
    original = acceleration.reason_against_semi_structured
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        acceleration,
        "reason_against_semi_structured",
        lambda shape, pattern, dtype, _: original(shape, pattern, dtype, torch.device("cuda")),
    )
    return products


def small_model():
    layers = [("sparse", masked()), ("free", masked(64, 64, None)), ("odd", masked(64, 72)), ("head", nn.Linear(8, 8))]
    return nn.Sequential(OrderedDict(layers)).eval()


def test_linears_that_fit_are_replaced_and_the_others_named(sparse_cores, caplog):
    model = small_model()
    others = list(model)[1:]
    with caplog.at_level(logging.WARNING):
        assert accelerate(model) == 1
    assert isinstance(model.sparse, SemiStructuredLinear)
    assert list(model)[1:] == others
    assert [record.getMessage() for record in caplog.records] == [
        "1 pruned linears run densely: pattern None instead of (2, 4)",
        "1 pruned linears run densely: shape (64, 72), no multiple of 64",
    ]


def test_without_the_hardware_nothing_changes(caplog):
    model = small_model()
    before = list(model)
    assert accelerate(model) == 0
    assert list(model) == before
    assert "on cpu, not on CUDA" in caplog.text


def test_armor_linears_that_fit_are_replaced_and_the_others_named(sparse_cores, caplog):
    layers = {"sparse": armor(), "groups": armor(pattern=(4, 8)), "odd": armor(64, 72)}
    model = nn.Sequential(OrderedDict(layers, wide=armor(dtype=torch.float32))).eval()
    assert accelerate(model) == 1
    assert isinstance(model.sparse, SemiStructuredArmorLinear)
    assert all(isinstance(linear, ArmorLinear) for linear in list(model)[1:])
    assert [record.getMessage() for record in caplog.records] == [
        "1 ARMOR linears run with a dense core: pattern (4, 8) instead of (2, 4)",
        "1 ARMOR linears run with a dense core: shape (64, 72), no multiple of 64",
        "1 ARMOR linears run with a dense core: torch.float32 instead of torch.float16 or torch.bfloat16",
    ]


def test_an_armor_linear_stays_without_the_hardware(caplog):
    model = nn.Sequential(armor(), armor()).eval()
    assert accelerate(model) == 0
    assert all(isinstance(linear, ArmorLinear) for linear in model)
    assert [record.getMessage() for record in caplog.records] == [
        "2 ARMOR linears run with a dense core: on cpu, not on CUDA"
    ]


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(
    ("bias", "shape", "dtype"),
    [(True, (128,), torch.bfloat16), (False, (3, 128), torch.float32), (True, (2, 5, 128), torch.bfloat16)],
)
def test_output_is_that_of_the_linear(sparse_cores, kind, bias, shape, dtype, generator):
    make, form = SPARSE[kind]
    linear = make(bias=bias)
    model = nn.Sequential(linear).eval()
    assert accelerate(model) == 1
    assert isinstance(model[0], form)
    activations = torch.randn(shape, generator=generator).to(dtype)
    output = model(activations)
    assert sparse_cores == ([(64, 128)] if dtype == torch.bfloat16 else [])
    assert output.dtype == dtype
    expected = linear(activations)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2 * max(1, float(expected.detach().std())))
    assert not output.requires_grad


@pytest.mark.parametrize("kind", SPARSE)
def test_autocast_gives_the_output_of_the_linear(sparse_cores, kind, generator):
    linear = SPARSE[kind][0]()
    model = nn.Sequential(linear).eval()
    accelerate(model)
    activations = torch.randn(3, 128, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(activations), linear(activations))


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("bias", [True, False])
def test_state_and_description_are_those_of_the_linear(sparse_cores, kind, bias):
    linear = SPARSE[kind][0](bias=bias)
    for name, parameter in linear.named_parameters():
        if name != "bias":
            parameter.data = parameter.data.float()  # as while it was trained
    model = nn.Sequential(linear).eval()
    assert accelerate(model) == 1
    fast = model[0]
    assert torch.equal(fast.weight, linear.weight.bfloat16())
    assert fast.description() == linear.description()
    assert (fast.bits_per_weight, fast.sparsity) == (linear.bits_per_weight, linear.sparsity)
    assert fast.storage_bytes == linear.storage_bytes
    expected, stored = linear.storage(), fast.storage()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in expected.items())
    again = CompressedLinear.from_description(fast.description())
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again.weight, fast.weight)


def test_loading_into_it_is_refused(sparse_cores):
    model = nn.Sequential(masked()).eval()
    state = model.state_dict()
    accelerate(model)
    with pytest.raises(RuntimeError, match="Expected to load 0 before accelerate"):
        model.load_state_dict(state)


def quantized(rows=40, columns=50, dtype=torch.bfloat16, bias=True):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(100, (rows, -(-columns // 4)), generator=generator)
    scales = torch.rand(columns, generator=generator) + 0.5, torch.rand(rows, generator=generator) + 0.5
    bias_values = torch.arange(rows).to(dtype) if bias else None
    return VQLinear(torch.randn(100, 4, generator=generator), codes, *scales, bias_values, dtype)


@needs_numba
@pytest.mark.parametrize(
    ("bias", "dtype", "shape"),
    [
        (True, torch.bfloat16, (50,)),
        (False, torch.float32, (1, 50)),
        (True, torch.float32, (3, 5, 50)),
        (False, torch.bfloat16, (2, 50, 50)),
    ],
)
def test_quantized_linear_looks_up_whole_codes(bias, dtype, shape, generator):
    linear = quantized(dtype=dtype, bias=bias)
    model = nn.Sequential(linear).eval()
    assert accelerate(model) == 1
    fast = model[0]
    assert isinstance(fast, LookupLinear)
    assert torch.equal(fast.weight, linear.weight)
    activations = torch.randn(shape, generator=generator).to(dtype)
    output = fast(activations)
    assert output.dtype == dtype
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output, linear(activations).detach(), rtol=tolerance, atol=20 * tolerance)
    assert not output.requires_grad


@needs_numba
def test_a_quantized_linear_is_saved_as_before_and_holds_no_packed_codes(caplog):
    linear = quantized()
    model = nn.Sequential(OrderedDict(fast=linear, large=quantized(rows=20))).eval()
    with caplog.at_level(logging.WARNING):
        assert accelerate(model) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "1 quantized linears run from packed codes: more than 4 codewords a row"
    ]
    expected, stored = linear.storage(), model.fast.storage()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert model.fast.description() == linear.description()
    assert (model.fast.bits_per_weight, model.fast.sparsity) == (linear.bits_per_weight, 0)
    assert [(name, held.dtype, held.shape) for name, held in model.fast.named_buffers()] == [
        ("columns", torch.uint8, (13, 40))
    ]
    with pytest.raises(RuntimeError, match="Expected to load fast before accelerate"):
        model.load_state_dict(nn.Sequential(OrderedDict(fast=linear)).state_dict(), strict=False)


@needs_numba
def test_a_quantized_linear_passes_gradients_on(generator):
    linear = quantized(dtype=torch.float32)
    model = nn.Sequential(linear).eval()
    accelerate(model)
    activations = torch.randn(2, 50, generator=generator, requires_grad=True)
    model(activations).sum().backward()
    torch.testing.assert_close(activations.grad, linear.weight.sum(dim=0).expand(2, -1).detach())


def test_without_numba_quantized_linears_stay(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "has_module", lambda name: False)
    model = nn.Sequential(quantized()).eval()
    assert accelerate(model) == 0
    assert isinstance(model[0], VQLinear)
    assert "1 quantized linears run from packed codes: Numba is not installed" in caplog.text


def test_quantized_linears_elsewhere_stay(caplog):
    model = nn.Sequential(quantized()).eval().to("meta")
    assert accelerate(model) == 0
    assert isinstance(model[0], VQLinear)
    assert [record.getMessage() for record in caplog.records] == [
        "1 quantized linears run from packed codes: on meta, not on a CPU"
    ]


def test_the_second_time_nothing_is_replaced(sparse_cores, caplog):
    model = nn.Sequential(masked(), armor()).eval()
    assert accelerate(model) == 2
    before = list(model)
    assert not caplog.records
    assert accelerate(model) == 0
    assert list(model) == before
    assert caplog.messages == ["2 linears stay: they are in their running form already"]


def test_a_linear_without_a_module_around_it_stays(sparse_cores, caplog):
    assert accelerate(masked().eval()) == 0
    assert caplog.messages == ["1 linears stay: they are the model itself"]


def test_a_linear_without_running_form_is_named(monkeypatch, caplog):
    monkeypatch.setattr(acceleration, "MaskedLinear", LookupLinear)  # so that it knows none
    model = nn.Sequential(masked()).eval()
    assert accelerate(model) == 0
    assert caplog.messages == ["1 linears stay: a MaskedLinear has no running form"]


def test_a_model_without_compressed_linears_stays_without_a_word(caplog):
    assert accelerate(nn.Sequential(nn.Linear(8, 8)).eval()) == 0
    assert not caplog.records


@needs_numba
def test_an_empty_lookup_linear_has_the_shapes_of_the_settings():
    module = LookupLinear.empty(quantized().settings())
    assert module.weight.shape == (40, 50)
    assert not module.weight.any()


def test_a_shared_linear_stays_shared(sparse_cores):
    linear = masked(64, 64)
    model = nn.Sequential(linear, nn.Sequential(linear), linear).eval()
    assert accelerate(model) == 1
    assert isinstance(model[0], SemiStructuredLinear)
    assert model[0] is model[1][0] is model[2]


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"evaluation mode.*model.eval\(\)"):
        accelerate(small_model().train())


@pytest.mark.parametrize("kind", SPARSE)
def test_an_empty_one_has_the_shapes_of_the_settings(sparse_cores, kind):
    make, form = SPARSE[kind]
    module = form.empty(make().settings())
    assert module.weight.shape == (64, 128)
    assert not module.weight.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(128,), (3, 128), (2, 5, 128)])
def test_accelerated_linear_on_a_gpu(kind, dtype, bias, shape):
    linear = SPARSE[kind][0](dtype=dtype, bias=bias, device="cuda")
    model = nn.Sequential(linear).eval()
    assert accelerate(model) == 1
    activations = torch.randn(shape, device="cuda").to(dtype)
    expected = F.linear(activations.float(), linear.weight.float(), linear.bias.float() if bias else None)
    assert (model(activations).float() - expected).norm() <= 2e-2 * expected.norm()
    torch.testing.assert_close(model[0].weight, linear.weight)
    assert torch.equal(model[0].storage()["values"], linear.storage()["values"])
