import pytest
import torch
from triton_interpreter import interpreted

pytest.importorskip("triton")

from trellis_cases import trellis_problem

from nowag_pl.functional.trellis.paths import find_path_by_tensors

CASES = [  # L, k, sequences, steps, weights, bounds
    (16, 2, 1, 4, True, True),
    (8, 2, 3, 12, True, True),
    (5, 1, 33, 4, False, True),  # two programs on the way back
    (8, 4, 2, 5, True, False),
]


@pytest.fixture(scope="module")
def states():
    """States of all cases, from Triton's interpreter."""
    return interpreted("trellis_cases.py", CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_search_in_the_interpreter(case, states):
    assert torch.equal(torch.tensor(states[case], dtype=torch.int32), find_path_by_tensors(*trellis_problem(*case)))


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["_advance", "_return"])
def test_kernels_compile_for_gpus(name, bits):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nowag_pl.kernels.cuda import trellis

    kernel = getattr(trellis, name)
    constants = {"BITS": bits, "SIZE": 256, "WEIGHTED": True, "SEQUENCES": 32}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"winners_ptr": "*u8", "places_ptr": "*i32", "states_ptr": "*i32"}
    pointers = {key: types.get(key, "*fp32") for key in kernel.arg_names if key.endswith("_ptr")}
    signature = {key: pointers.get(key, "constexpr" if key in constants else "i32") for key in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (16, 2, 70, 256, True, True)], ids=str)
def test_search_on_a_gpu(case):
    targets, roots, values, bits, starts, ends = trellis_problem(*case, device="cuda")
    from nowag_pl.kernels.cuda.trellis import find_path

    found, expected = (
        search(targets, roots, values, bits, starts, ends).long() for search in (find_path, find_path_by_tensors)
    )
    weights = 1 if roots is None else roots.square()
    costs = [(weights * (targets - values[each]).square()).sum(dim=1) for each in (found, expected)]
    torch.testing.assert_close(*costs)
