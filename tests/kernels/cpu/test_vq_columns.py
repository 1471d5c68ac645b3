import pytest
import torch
from vq_oracle import problem

pytest.importorskip("numba")

from nowag_pl.functional.storage.packing import unpack
from nowag_pl.functional.vq import matmul as vq_matmul
from nowag_pl.functional.vq.matmul import (
    CPU_MAX_LOOKUP_TOKENS,
    code_columns,
    codeword_table,
    codewords_of,
    columns_matmul,
)
from nowag_pl.kernels.bits import code_bits
from nowag_pl.kernels.cpu import vq as vq_numba
from nowag_pl.kernels.cpu import vq_columns, vq_rows
from nowag_pl.kernels.cpu.vq import codeword_chunks
from nowag_pl.kernels.cpu.vq_columns import decode_columns, multiply_columns
from nowag_pl.kernels.cpu.vq_rows import multiply_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def columns_of(case):
    rows, size = len(case.out_scale), len(case.codebook)
    num_groups = -(-len(case.in_scale) // case.codebook.shape[1])
    codes = unpack(case.codes, code_bits(size), rows * num_groups)
    return code_columns(codes.view(rows, num_groups), size)


def product(case, tokens=None):
    """Return the product of whole codes, in the form that suits the number of rows."""
    table = codeword_table(case.codebook, len(case.out_scale))
    shape, scales = tuple(case.codebook.shape), (case.in_scale, case.out_scale)
    return columns_matmul(case.tokens if tokens is None else tokens, columns_of(case), table, shape, *scales)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65536, torch.uint16), (65537, torch.int32)],
)
def test_columns_hold_every_code_in_the_narrowest_type(size, dtype):
    codes = torch.tensor([[0, 1, size - 1], [size - 1, 0, 1]], dtype=torch.int32)
    columns = code_columns(codes, size)
    assert columns.dtype == dtype
    assert columns.is_contiguous()
    assert columns.int().T.tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("dim", "size", "rows", "columns"),
    [
        (3, 5, 1, 1),
        (6, 4096, 70, 37),
        (4, 256, 9, 300),
        (4, 256, 140, 30),
        (1, 2, 70, 37),
        (1, 4000, 70, 37),
        (2, 70000, 9, 300),
        (6, 4096, 1, 1),
        (17, 300, 9, 40),
    ],
)
def test_product_of_every_shape_and_number_of_tokens(dim, size, rows, columns):
    for num_tokens in (0, 1, CPU_MAX_LOOKUP_TOKENS, CPU_MAX_LOOKUP_TOKENS + 1):
        case = problem(rows, columns, dim, size, num_tokens)
        output = product(case)
        assert output.shape == (num_tokens, rows)
        assert num_tokens == 0 or case.error(output) < 1e-5


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_product_of_every_type_is_that_of_packed_codes(dtype, num_tokens):
    case = problem(101, 203, 6, 4096, num_tokens, dtype)
    output = product(case, case.tokens.view(1, num_tokens, 203))
    assert output.shape == (1, num_tokens, 101)
    assert case.error(output[0]) < TOLERANCE[dtype]
    torch.testing.assert_close(output[0], vq_matmul.vq_matmul(*case), rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize("block_groups", [1, 8, 11])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_blocks_and_threads_change_nothing(block_groups, num_threads, monkeypatch):
    monkeypatch.setattr(vq_columns, "max_block_groups", lambda size: block_groups)
    monkeypatch.setattr(vq_columns, "MIN_CODES", 0)
    monkeypatch.setattr(vq_rows, "MIN_CODES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    case = problem(9, 51 * 6, 6, 4096, 2)
    columns, scales = columns_of(case), (case.in_scale, case.out_scale)
    assert case.error(multiply_columns(case.tokens, columns, codeword_chunks(case.codebook), *scales)) < 1e-5
    registers = codeword_table(case.codebook, 9)
    assert registers.shape == (4096, 8)
    assert case.error(multiply_rows(case.tokens, columns, registers, 6, *scales)) < 1e-5


@pytest.mark.parametrize(
    ("size", "dim", "rows", "shape"),
    [
        (4096, 6, 2458, (8, 6, 512)),
        (4096, 6, 2457, (4096, 8)),
        (5, 3, 8, (1, 3, 16)),
        (50, 2, 7, (1, 2, 64)),
        (300, 17, 9, (1, 17, 304)),
        (300, 16, 9, (300, 16)),
        (4000, 1, 9, (4000, 2)),
    ],
)
def test_tables_of_products_are_for_many_rows(size, dim, rows, shape):
    codebook = torch.randn(size, dim)
    table = codeword_table(codebook, rows)
    assert table.shape == shape
    assert torch.equal(codewords_of(table, size, dim), codebook)


@pytest.mark.parametrize(("num_threads", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
@pytest.mark.parametrize(("dim", "size"), [(6, 4096), (3, 5), (4, 256)])
def test_decode_some_rows(dim, size, dtype, num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr(vq_columns, "_COPIED_GROUPS", 4)
    case = problem(40, 11 * dim, dim, size, 0)
    ones = case._replace(in_scale=torch.ones(11 * dim), out_scale=torch.ones(40))
    for start, stop in [(0, 40), (8, 37), (39, 40)]:
        out = torch.full((stop - start, 11 * dim), -7.0, dtype=dtype)
        decode_columns(columns_of(case), case.codebook.to(dtype), start, out)
        assert torch.equal(out, ones.weight[start:stop].to(dtype))


def test_a_cache_of_any_size_holds_some_groups():
    assert [vq_numba.max_block_groups(size) for size in (2, 4096, 2**24)] == [128, 64, 8]
