"""Packed tiles decoded and multiplied by Triton kernels, in its interpreter, compiled, and on a GPU."""

import pytest
import torch
from triton_interpreter import interpreted

pytest.importorskip("triton")

from trellis_matmul_cases import tiles_problem

from nowag_pl.functional.trellis.tiles import from_tiles, unpack_states

CASES = [  # code, L, k, input tiles, output tiles, tokens
    ("mul1", 16, 2, 5, 3, 1),
    ("mul1", 12, 3, 2, 1, 5),
    ("3inst", 16, 4, 1, 2, 17),
    ("mcg", 9, 1, 2, 2, 1),
]


def expected(case, device="cpu"):
    tokens, packed, values = tiles_problem(*case, device=device)
    matrix = from_tiles(values[unpack_states(packed, case[2], case[1]).long()])
    return matrix, tokens @ matrix.T


@pytest.fixture(scope="module")
def results():
    """Results of all cases, from Triton's interpreter."""
    return interpreted("trellis_matmul_cases.py", CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tiles_in_the_interpreter(case, results):
    matrix, product = map(torch.tensor, results[case])
    assert torch.equal(matrix, expected(case)[0])
    torch.testing.assert_close(product, expected(case)[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["_decode", "_multiply"])
@pytest.mark.parametrize("tokens", [1, pytest.param(32, marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus(name, tokens):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nowag_pl.kernels.cuda import trellis_matmul

    kernel = getattr(trellis_matmul, name)
    constants = {"BITS": 3, "STATE_BITS": 16, "COMPUTED": True, "TOKENS": tokens, "OUTPUTS": 32, "INPUTS": 64}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    pointers = {key: "*i32" if key == "words_ptr" else "*fp32" for key in kernel.arg_names if key.endswith("_ptr")}
    signature = {key: pointers.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, ("mul1", 16, 2, 256, 256, 1), ("mul1", 16, 4, 64, 100, 33)], ids=str)
def test_tiles_on_a_gpu(case):
    from nowag_pl.kernels.cuda.trellis_matmul import decode, multiply

    tokens, packed, values = tiles_problem(*case, device="cuda")
    matrix, product = expected(case, "cuda")
    assert torch.equal(decode(packed, values, case[2]), matrix)
    # Products take 11 bits of mantissa.
    found = multiply(tokens, packed, values, case[2], case[0] == "mul1")
    torch.testing.assert_close(found, product, rtol=2e-2, atol=2e-2 * float(product.abs().max()))
