import json
import pickle
from contextlib import contextmanager
from copy import deepcopy
from math import ceil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from nowag_pl.functional import chunks
from nowag_pl.functional.vq import matmul as vq_matmul
from nowag_pl.functional.vq.matmul import CPU_MAX_TOKENS
from nowag_pl.kernels import dispatch
from nowag_pl.modules import CompressedLinear, VQLinear

DTYPES = [torch.float32, torch.bfloat16]
needs_numba = pytest.mark.skipif(not dispatch.has_module("numba"), reason="Numba is an extra")


def make(rows=5, columns=7, dim=3, size=6, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(size, dim, generator=generator).half().float()
    codes = torch.randint(size, (rows, ceil(columns / dim)), generator=generator)
    in_scale = torch.rand(columns, generator=generator).half().float() + 1
    out_scale = torch.rand(rows, generator=generator).half().float() + 1
    bias_values = torch.randn(rows, generator=generator).to(dtype) if bias else None
    in_scale, out_scale = in_scale.half().float(), out_scale.half().float()
    return VQLinear(codebook, codes, in_scale, out_scale, bias_values, dtype), codebook, codes


def restored(module):
    copy = CompressedLinear.from_description(json.loads(json.dumps(module.description())))
    copy.load_state_dict(module.storage())
    return copy


@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    dim=st.integers(1, 5),
    size=st.integers(1, 9),
)
def test_weight_equals_scalar_loops(rows, columns, dim, size):
    module, codebook, codes = make(rows, columns, dim, size)
    weight, in_scale, out_scale = (t.detach() for t in (module.weight, module.in_scale, module.out_scale))
    assert weight.shape == (rows, columns)
    for i in range(rows):
        for j in range(columns):
            codeword = codebook[codes[i, j // dim]]
            expected = float(out_scale[i]) * float(codeword[j % dim]) * float(in_scale[j])
            assert weight[i, j].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_without_gradients_is_the_same_in_chunks_of_rows(dtype, monkeypatch):
    module, _, _ = make(dtype=dtype)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 15)  # two rows
    with torch.no_grad():
        weight = module.weight
    assert torch.equal(weight, module.weight.detach())
    assert module.weight.requires_grad
    assert not weight.requires_grad


def test_codes_come_back():
    module, _, codes = make(columns=8)
    assert torch.equal(module.unpacked_codes.long(), codes)
    assert module.codebook_use == len(codes.unique()) / 6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_linear(dtype, bias, generator):
    module, _, _ = make(dtype=dtype, bias=bias)
    activations = torch.randn(2, 3, 7, generator=generator).to(dtype)
    assert module.weight.dtype == dtype
    output = module(activations)
    assert output.dtype == dtype
    assert torch.equal(output, F.linear(activations, module.weight, module.bias))


@pytest.mark.parametrize("bias", [True, False])
def test_output_has_the_type_of_the_activations(bias):
    module, _, _ = make(dtype=torch.bfloat16, bias=bias)
    assert module(torch.ones(2, 7, dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize(("dtype", "bias"), list(zip(DTYPES, (True, False), strict=True)))
@pytest.mark.parametrize("columns", [6, 7])
def test_storage_round_trip(dtype, bias, columns):
    module, _, _ = make(dtype=dtype, bias=bias, columns=columns)
    copy = restored(module)
    assert torch.equal(copy.weight, module.weight)
    assert copy.weight.dtype == dtype
    assert torch.equal(copy.codes, module.codes)
    assert (copy.bias is None) == (module.bias is None)
    assert bias is False or torch.equal(copy.bias, module.bias)
    assert copy.description() == module.description()


def test_storage_round_trip_keeps_the_type_of_the_bias():
    codes, bias = torch.zeros(2, 2).int(), torch.tensor([1.0, 1.001])
    module = VQLinear(torch.ones(1, 2), codes, torch.ones(4), torch.ones(2), bias, torch.bfloat16)
    assert torch.equal(restored(module).bias, bias)


def test_codebook_and_scales_hold_only_what_is_stored(generator):
    codebook, in_scale = torch.randn(4, 2, generator=generator), torch.rand(6, generator=generator)
    out_scale, codes = torch.rand(3, generator=generator), torch.zeros(3, 3).int()
    module = VQLinear(codebook, codes, in_scale, out_scale)
    for held, given_values in zip(
        (module.codebook, module.in_scale, module.out_scale), (codebook, in_scale, out_scale), strict=True
    ):
        assert torch.equal(held, given_values.half().float())
    stored = {name: tensor.dtype for name, tensor in module.storage().items()}
    assert stored.pop("codes") == torch.uint8
    assert set(stored.values()) == {torch.float16}


def test_no_integers_wider_than_bytes_are_held():
    module, _, _ = make()
    assert {name: buffer.dtype for name, buffer in module.named_buffers()} == {"codes": torch.uint8}


@pytest.mark.parametrize(("columns", "dim", "size"), [(7, 3, 6), (8, 4, 16), (9, 6, 5), (6, 6, 1)])
def test_bits_per_weight_is_what_is_stored(columns, dim, size):
    module, _, _ = make(columns=columns, dim=dim, size=size)
    assert 0 <= module.storage_bytes * 8 - module.bits_per_weight * 5 * columns < 8 - 1e-6
    assert module.sparsity == 0


def test_gradients_reach_codebook_and_scales_and_codes_stay(generator):
    module, _, codes = make()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 7, generator=generator)).square().sum().backward()
    optimizer.step()
    assert set(before) == {"codebook", "in_scale", "out_scale", "bias"}
    assert all((parameter != before[name]).any() for name, parameter in module.named_parameters())
    assert (module.in_scale != before["in_scale"]).all()
    assert (module.out_scale != before["out_scale"]).all()
    assert torch.equal(module.unpacked_codes.long(), codes)


def test_codes_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"codes of shape \(2, 3\), but got \(2, 2\)"):
        VQLinear(torch.ones(4, 3), torch.zeros(2, 2).int(), torch.ones(7), torch.ones(2))


@pytest.mark.parametrize("code", [-1, 6, 7, 8])
def test_codes_outside_of_the_codebook_are_refused(code):
    with pytest.raises(ValueError, match="Expected"):
        VQLinear(torch.ones(6, 3), torch.full((2, 1), code), torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("bad", [1e6, float("nan")])
def test_values_that_sixteen_bits_do_not_hold_are_refused(bad):
    with pytest.raises(ValueError, match="codebook and scales under 65504"):
        VQLinear(torch.ones(1, 2), torch.zeros(2, 1).int(), torch.tensor([1.0, bad]), torch.ones(2))


@contextmanager
def without_weight(monkeypatch, module):
    """Fail if a tensor of a quarter of the weight's size is made; a tile of rows is far smaller."""
    monkeypatch.setattr(vq_matmul, "TILE_BYTES", 2**15)
    with LargestTensor() as largest:
        yield
    assert 0 < largest.elements < module.out_features * module.in_features / 4


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("numba", [pytest.param(True, marks=needs_numba), False])
@pytest.mark.parametrize(
    ("dtype", "bias", "shape"),
    [
        (torch.float32, True, (1003,)),
        (torch.bfloat16, False, (1, 1003)),
        (torch.float16, True, (2, 3, 1003)),
        (torch.float32, False, (CPU_MAX_TOKENS, 1003)),
        (torch.bfloat16, True, (0, 1003)),
    ],
)
def test_few_tokens_never_reconstruct_the_weight(dtype, bias, shape, numba, generator, monkeypatch):
    module, _, _ = make(512, 1003, bias=bias, dtype=dtype)
    activations = torch.randn(shape, generator=generator).to(dtype)
    bias_values = None if module.bias is None else module.bias.float()
    expected = F.linear(activations.float(), module.weight.float(), bias_values)
    if not numba:
        monkeypatch.setattr(dispatch, "has_module", lambda name: False)
    with torch.no_grad(), without_weight(monkeypatch, module):
        output = module(activations)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    assert (output.float() - expected).norm() <= TOLERANCES[dtype] * expected.norm()


def test_many_tokens_take_the_reconstructed_weight(generator):
    module, _, _ = make(dtype=torch.bfloat16)
    activations = torch.randn(CPU_MAX_TOKENS + 1, 7, generator=generator).bfloat16()
    with torch.no_grad():
        assert torch.equal(module(activations), F.linear(activations, module.weight, module.bias))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens_give_the_gradients_of_the_weight(num_tokens, generator):
    module, codebook, codes = make()
    activations = torch.randn(num_tokens, 7, generator=generator, requires_grad=True)
    reference = [t.detach().clone().requires_grad_() for t in (codebook, module.in_scale, module.out_scale)]
    inputs, bias = activations.detach().clone().requires_grad_(), module.bias.detach().clone().requires_grad_()
    rows = reference[0][codes].flatten(1)[:, :7]
    F.linear(inputs, reference[2][:, None] * rows * reference[1], bias).square().sum().backward()
    module(activations).square().sum().backward()
    for ours, expected in zip(
        (module.codebook, module.in_scale, module.out_scale, module.bias, activations),
        (*reference, bias, inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", ["activations", "bias"])
def test_one_thing_that_is_trained_is_enough_for_gradients(trained):
    module, _, _ = make()
    module.requires_grad_(False)
    module.bias.requires_grad_(trained == "bias")
    activations = torch.ones(1, 7, requires_grad=trained == "activations")
    assert module(activations).requires_grad


def test_frozen_linear_never_reconstructs_the_weight(monkeypatch):
    module, _, _ = make(512, 1003)
    with without_weight(monkeypatch, module):
        assert not module.requires_grad_(False)(torch.ones(2, 1003)).requires_grad


@pytest.mark.parametrize("num_tokens", [1, 3, CPU_MAX_TOKENS + 1])
def test_autocast_gives_its_type(num_tokens):
    module, _, _ = make()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(torch.ones(num_tokens, 7)).dtype == torch.bfloat16


def test_parameters_that_change_are_seen(generator):
    module, _, _ = make(bias=False)
    activations = torch.randn(1, 7, generator=generator)
    with torch.no_grad():
        before = module(activations)
        module.codebook.mul_(2)
        torch.testing.assert_close(module(activations), 2 * before)
        module.out_scale.mul_(0.5)
        torch.testing.assert_close(module(activations), before)
        module.in_scale.mul_(2)
        torch.testing.assert_close(module(activations), 2 * before)


@pytest.mark.parametrize("copy", [deepcopy, lambda module: pickle.loads(pickle.dumps(module))])  # noqa: S301
def test_copies_run_after_the_original_ran(copy):
    module, _, _ = make()
    activations = torch.ones(1, 7)
    with torch.no_grad():
        expected = module(activations)
        duplicate = copy(module)
        assert torch.equal(duplicate(activations), expected)
    assert set(duplicate.state_dict()) == {"codes", "codebook", "in_scale", "out_scale", "bias"}
