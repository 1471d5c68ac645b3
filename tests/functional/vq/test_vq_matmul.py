import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vq_oracle import problem

from nowag_pl.functional.vq import matmul as module
from nowag_pl.functional.vq.matmul import CPU_MAX_TOKENS, CUDA_MAX_TOKENS, is_for_few_tokens, vq_matmul
from nowag_pl.kernels import dispatch

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(dispatch, "has_module", lambda name: False)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dim=st.integers(1, 7),
    size=st.integers(1, 70),
    num_tokens=st.integers(0, 4),
    dtype=st.sampled_from(list(TOLERANCE)),
    tile_bytes=st.sampled_from([1, 1000, 2**22]),
)
def test_tiles_equal_the_product_of_every_shape(rows, columns, dim, size, num_tokens, dtype, tile_bytes):
    case = problem(rows, columns, dim, size, num_tokens, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(dispatch, "has_module", lambda name: False)
        monkeypatch.setattr(module, "TILE_BYTES", tile_bytes)
        output = vq_matmul(*case)
    assert output.shape == (num_tokens, rows)
    assert num_tokens == 0 or case.error(output) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_product_with_and_without_numba(dtype, num_tokens, monkeypatch):
    case = problem(101, 203, 6, 4096, num_tokens, dtype)
    fast = vq_matmul(*case)
    monkeypatch.setattr(dispatch, "has_module", lambda name: False)
    slow = vq_matmul(*case)
    assert max(case.error(fast), case.error(slow)) < TOLERANCE[dtype]


def test_leading_dimensions_stay_and_nothing_is_written(without_extras):
    case = problem(9, 10, 3, 20, 6)
    before = [tensor.clone() for tensor in case]
    output = vq_matmul(case.tokens.view(2, 3, 10), *case[1:])
    assert torch.equal(output, vq_matmul(*case).view(2, 3, 9))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(case, before, strict=True))


def test_large_activations_do_not_overflow_in_float16(without_extras):
    case = problem(9, 10, 3, 20, 2, torch.float16)
    case = case._replace(tokens=case.tokens * 2e4, in_scale=case.in_scale * 100, out_scale=case.out_scale * 1e-6)
    assert case.error(vq_matmul(*case)) < 2e-3


@pytest.mark.parametrize(("size", "looks_up"), [(1, False), (2, True), (36, True), (37, False)])
def test_one_token_is_looked_up_while_codewords_are_few(size, looks_up, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_by_lookup", lambda token, *rest: calls.append(1) or token.new_zeros(1, 9))
    for num_tokens in (1, 2):
        vq_matmul(*problem(9, 10, 3, size, num_tokens))
    assert calls == [1] * looks_up


def test_few_tokens(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(dispatch, "has_module", lambda name: name == "triton")
    assert [is_for_few_tokens(CPU_MAX_TOKENS + more, cpu) for more in (0, 1)] == [True, False]
    assert [is_for_few_tokens(CUDA_MAX_TOKENS + more, cuda) for more in (0, 1)] == [True, False]
    monkeypatch.setattr(dispatch, "has_module", lambda name: False)
    assert not is_for_few_tokens(1, cuda)
    assert is_for_few_tokens(1, cpu)
