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
    DenseLinear,
    LookupLinear,
    MaskedLinear,
    SemiStructuredArmorLinear,
    SemiStructuredLinear,
    VQLinear,
)
from nowag_pl.modules.running import acceleration, forms, unpacking

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
    original = forms.reason_against_semi_structured
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(
        forms,
        "reason_against_semi_structured",
        lambda shape, pattern, dtype, _: original(shape, pattern, dtype, torch.device("cuda")),
    )
    last_is_fastest(monkeypatch)
    return products


def last_is_fastest(monkeypatch):
    """Of the forms of a linear, which begin with the simplest."""
    monkeypatch.setattr(acceleration, "_seconds", lambda modules, _: [1 / (1 + n) for n in range(len(modules))])


@pytest.fixture
def whole_codes(monkeypatch):
    """On a CPU, whole codes are the last form of a vector-quantized linear."""
    last_is_fastest(monkeypatch)


def small_model():
    layers = [("sparse", masked()), ("free", masked(64, 64, None)), ("odd", masked(64, 72)), ("head", nn.Linear(8, 8))]
    return nn.Sequential(OrderedDict(layers)).eval()


def rows_of(caplog):
    """Return the rows of the one table that was logged, as words."""
    (table,) = caplog.messages
    return [line.split() for line in table.splitlines()[4:]]


def test_linears_that_fit_are_replaced_and_the_others_run_densely(sparse_cores, caplog):
    model = small_model()
    head = model.head
    assert accelerate(model) is model
    assert [type(each) for each in model[:3]] == [SemiStructuredLinear, DenseLinear, DenseLinear]
    assert model.head is head
    assert [row[:8] for row in rows_of(caplog)] == [
        ["1", "MaskedLinear", "64", "x", "128", "sparse", "tensor", "cores"],
        ["1", "MaskedLinear", "64", "x", "64", "dense", "weight", "2.00x"],
        ["1", "MaskedLinear", "64", "x", "72", "dense", "weight", "2.00x"],
    ]


def test_armor_linears_that_fit_are_replaced(sparse_cores):
    model = accelerate(nn.Sequential(armor(), armor(pattern=(4, 8)), armor(64, 72), armor(dtype=torch.float32)).eval())
    assert [type(each) for each in model] == [SemiStructuredArmorLinear, ArmorLinear, ArmorLinear, ArmorLinear]


@pytest.mark.parametrize("make", [masked, armor])
def test_without_the_hardware_the_weight_is_dense(make, monkeypatch, generator):
    monkeypatch.setattr(acceleration, "_seconds", lambda modules, _: [1.0, 0.5, *([1.0] * len(modules))])
    linear = make(dtype=torch.float32)
    model = accelerate(nn.Sequential(linear).eval())
    activations = torch.randn(3, 128, generator=generator)
    torch.testing.assert_close(model(activations), linear(activations), rtol=1e-4, atol=1e-4)
    assert isinstance(model[0], DenseLinear if make is masked else ArmorLinear)
    assert make is masked or model[0].is_unpacked


@pytest.mark.parametrize("pattern", [(2, 4), None])
def test_a_dense_linear_is_saved_as_the_pruned_one_and_holds_no_kept_values(pattern):
    linear = masked(pattern=pattern)
    fast = DenseLinear(linear, torch.float32)
    expected, stored = linear.storage(), fast.storage()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert fast.description() == linear.description()
    assert [name for name, _ in (*fast.named_parameters(), *fast.named_buffers())] == ["bias", "mask", "dense"]
    assert DenseLinear.empty(linear.settings()).weight.shape == (64, 128)


def test_the_fastest_form_is_taken_by_kind_and_size(monkeypatch, caplog):
    """Times are those of one token; a dense linear comes first, then the forms in their order."""
    times = {40: [4.0, 4.0, 9.0, 2.0], 20: [4.0, 5.0, 6.0, 7.0]}
    monkeypatch.setattr(
        acceleration, "_seconds", lambda modules, tokens: times[modules[0][0].out_features][: len(modules)]
    )
    monkeypatch.setattr(forms, "reason_against_columns", lambda size, device: None)
    model = accelerate(nn.Sequential(quantized(), quantized(rows=20), quantized()).eval())
    assert [type(each) for each in model] == [LookupLinear, VQLinear, LookupLinear]
    assert model[1].is_unpacked
    assert [row[:8] for row in rows_of(caplog)] == [
        ["2", "VQLinear", "40", "x", "50", "whole", "codes", "2.00x"],
        ["1", "VQLinear", "20", "x", "50", "dense", "weight", "0.80x"],
    ]


def test_where_memory_is_short_linears_stay_packed_and_the_table_says_so(monkeypatch, caplog):
    monkeypatch.setattr(unpacking, "_free_bytes", lambda device: 2**12)
    model = nn.Sequential(masked(), armor()).eval()
    assert not unpacking.unpack_linears(model, torch.bfloat16)
    assert "linears stay packed, and run more slowly than dense ones: dense weights take 0.0 GiB on cpu" in caplog.text
    caplog.clear()
    accelerate(model)
    assert [type(each) for each in model] == [MaskedLinear, ArmorLinear]
    assert not any(each.is_unpacked for each in model)
    assert "packed" in caplog.text


def test_times_are_measured(caplog):
    accelerate(nn.Sequential(masked(), quantized(), armor()).eval())
    assert len(rows_of(caplog)) == 3
    assert all(float(word[:-1]) > 0 for row in rows_of(caplog) for word in row if word.endswith("x") and len(word) > 1)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(
    ("bias", "shape", "dtype"),
    [(True, (128,), torch.bfloat16), (False, (3, 128), torch.float32), (True, (2, 5, 128), torch.bfloat16)],
)
def test_output_is_that_of_the_linear(sparse_cores, kind, bias, shape, dtype, generator):
    make, form = SPARSE[kind]
    linear = make(bias=bias)
    model = accelerate(nn.Sequential(linear).eval())
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
    model = accelerate(nn.Sequential(linear).eval())
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
def test_quantized_linear_takes_whole_codes(bias, dtype, shape, generator, whole_codes):
    linear = quantized(dtype=dtype, bias=bias)
    model = accelerate(nn.Sequential(linear).eval())
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
@pytest.mark.parametrize("rows", [24, 400])
def test_a_quantized_linear_is_saved_as_before_and_holds_no_packed_codes(rows, whole_codes):
    linear = quantized(rows)
    model = accelerate(nn.Sequential(OrderedDict(fast=linear)).eval())
    expected, stored = linear.storage(), model.fast.storage()
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())
    assert all(stored[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert model.fast.description() == linear.description()
    assert (model.fast.bits_per_weight, model.fast.sparsity) == (linear.bits_per_weight, 0)
    assert [(name, held.dtype, held.shape) for name, held in model.fast.named_buffers()] == [
        ("columns", torch.uint8, (13, rows)),
        ("table", torch.float32, (100, 4) if rows == 24 else (1, 4, 112)),
    ]
    with pytest.raises(RuntimeError, match="Expected to load fast before accelerate"):
        model.load_state_dict(nn.Sequential(OrderedDict(fast=linear)).state_dict(), strict=False)


@needs_numba
@pytest.mark.parametrize("is_unpacked", [True, False])
@torch.no_grad()
def test_many_tokens_take_the_unpacked_weight_if_there_is_one(is_unpacked, generator, monkeypatch):
    linear = quantized(dtype=torch.float32)
    if is_unpacked:
        linear.unpack(torch.float32)
    fast = LookupLinear(linear)
    assert fast.is_unpacked == is_unpacked
    few, many = (torch.randn(count, 50, generator=generator) for count in (4, 5))
    expected = F.linear(many, linear.weight, linear.bias)
    torch.testing.assert_close(fast(many), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(fast(many), expected) == is_unpacked
    torch.testing.assert_close(fast(few), F.linear(few, linear.weight, linear.bias), rtol=1e-5, atol=1e-3)
    monkeypatch.setattr(LookupLinear, "from_codes", lambda *_: pytest.fail("from codes"))
    if is_unpacked:
        fast(many)


@needs_numba
def test_a_quantized_linear_passes_gradients_on(generator, whole_codes):
    linear = quantized(dtype=torch.float32)
    model = accelerate(nn.Sequential(linear).eval())
    activations = torch.randn(2, 50, generator=generator, requires_grad=True)
    model(activations).sum().backward()
    torch.testing.assert_close(activations.grad, linear.weight.sum(dim=0).expand(2, -1).detach())


def test_without_numba_quantized_linears_are_unpacked_and_the_table_says_why(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "has_module", lambda name: False)
    model = accelerate(nn.Sequential(quantized()).eval())
    assert isinstance(model[0], VQLinear)
    assert "Numba is not" in caplog.text


def test_the_second_time_nothing_is_replaced(sparse_cores):
    model = accelerate(nn.Sequential(masked(), armor()).eval())
    before = list(model)
    assert list(accelerate(model)) == before


def test_a_linear_without_a_module_around_it_stays(sparse_cores, caplog):
    linear = masked().eval()
    assert accelerate(linear) is linear
    assert not caplog.records


def test_a_model_without_compressed_linears_stays_without_a_word(caplog):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    assert accelerate(model) is model
    assert not caplog.records


@needs_numba
def test_an_empty_lookup_linear_has_the_shapes_of_the_settings():
    module = LookupLinear.empty(quantized().settings())
    assert module.weight.shape == (40, 50)
    assert not module.weight.any()


def test_a_shared_linear_stays_shared(sparse_cores):
    linear = masked(64, 64)
    model = nn.Sequential(linear, nn.Sequential(linear), linear).eval()
    accelerate(model)
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
    model = accelerate(nn.Sequential(linear).eval())
    activations = torch.randn(shape, device="cuda").to(dtype)
    expected = F.linear(activations.float(), linear.weight.float(), linear.bias.float() if bias else None)
    assert (model(activations).float() - expected).norm() <= 2e-2 * expected.norm()
    torch.testing.assert_close(model[0].weight, linear.weight)
    assert torch.equal(model[0].storage()["values"], linear.storage()["values"])
