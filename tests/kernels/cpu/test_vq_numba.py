import multiprocessing

import pytest
import torch
from vq_oracle import problem

pytest.importorskip("numba")

from nowag_pl.functional.storage.packing import unpack
from nowag_pl.kernels.bits import code_bits
from nowag_pl.kernels.cpu import vq as vq_numba
from nowag_pl.kernels.cpu.vq import decode, sum_lookups

WIDTHS = [(3, 5), (6, 4096), (1, 2), (2, 9000)]  # d and k; codes of 3, 12, 1 and 14 bits


def expected_codewords(case, count):
    codes = unpack(case.codes, code_bits(len(case.codebook)), count).long()
    return case.codebook[codes]


def check_sums(case, num_rows, num_groups):
    dim = case.codebook.shape[1]
    groups = torch.randn(num_groups, dim, generator=torch.Generator().manual_seed(1))
    codewords = expected_codewords(case, num_rows * num_groups).view(num_rows, num_groups * dim)
    sums = sum_lookups(case.codes, case.codebook, groups, num_rows)
    torch.testing.assert_close(sums.double(), codewords.double() @ groups.flatten().double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dim", "size"), WIDTHS)
def test_sums_of_lookups(dim, size):
    for rows, groups in ((1, 1), (70, 37), (3, 300)):
        check_sums(problem(rows, groups * dim, dim, size, 0), rows, groups)


@pytest.mark.parametrize("block_groups", [1, 8, 11])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_blocks_and_threads_change_nothing(block_groups, num_threads, monkeypatch):
    monkeypatch.setattr(vq_numba, "_MAX_BLOCK_GROUPS", block_groups)
    monkeypatch.setattr(vq_numba, "_TILE_ROWS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    check_sums(problem(9, 50 * 6, 6, 4096, 0), 9, 50)


@pytest.mark.parametrize(("dim", "size"), WIDTHS)
@pytest.mark.parametrize(("num_threads", "dtype"), [(1, torch.float32), (3, torch.bfloat16)])
def test_decode_some_codes(dim, size, num_threads, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    case = problem(7, 11 * dim, dim, size, 0)
    codewords = expected_codewords(case, 77).to(dtype)
    for start, stop in [(0, 77), (8, 76), (40, 41)]:
        out = torch.full((stop - start, dim), -7.0, dtype=dtype)
        decode(case.codes, case.codebook.to(dtype), start, out)
        assert torch.equal(out, codewords[start:stop])


def test_codes_may_lie_anywhere_in_memory():
    case = problem(20, 60, 6, 4096, 0)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), case.codes])[3:]
    assert shifted.data_ptr() % 8
    check_sums(case._replace(codes=shifted), 20, 10)


@pytest.mark.slow
def test_a_forked_process_gets_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    case = problem(9, 60, 6, 4096, 0)
    check_sums(case, 9, 10)
    process = multiprocessing.get_context("fork").Process(target=check_sums, args=(case, 9, 10))
    process.start()
    process.join(60)
    assert process.exitcode == 0
