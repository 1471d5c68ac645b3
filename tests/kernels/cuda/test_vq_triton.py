import pytest
import torch
from triton_interpreter import interpreted
from vq_oracle import problem

triton = pytest.importorskip("triton")

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
SHAPES = [  # rows, columns, d, k, tokens
    (37, 203, 6, 4096, 1),  # 12 bits, padded subvectors
    (37, 203, 6, 4096, 3),
    (9, 70, 5, 32, 70),  # 5 bits, two programs of tokens
    (33, 17, 3, 6, 1),  # 3 bits
    (20, 51, 2, 9000, 1),  # 14 bits
    (20, 51, 2, 9000, 17),
    (5, 9, 4, 1, 2),  # 0 bits
    (17, 8, 1, 70000, 1),  # 17 bits
]
# Triton's interpreter multiplies bfloat16 matrices as integers
CASES = [(*shape, dtype) for shape in SHAPES for dtype in TOLERANCE if dtype != "bfloat16" or shape[-1] == 1]


@pytest.fixture(scope="module")
def errors():
    """Relative errors of all cases, from Triton's interpreter."""
    return interpreted("triton_cases.py", CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_in_the_interpreter(case, errors):
    assert errors[case] < TOLERANCE[case[-1]]


@pytest.mark.parametrize(
    ("capability", "dtype", "tokens"),
    [
        (80, "bf16", 1),
        pytest.param(80, "bf16", 16, marks=pytest.mark.slow),
        pytest.param(90, "fp32", 16, marks=pytest.mark.slow),
        pytest.param(90, "fp16", 64, marks=pytest.mark.slow),
    ],
)
def test_kernel_compiles_for_gpus(capability, dtype, tokens):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nowag_pl.kernels.cuda.vq import _kernel

    constants = {"BITS": 12, "DIM": 6, "TOKENS": tokens, "ROWS": 16, "GROUPS": 32}
    types = {"tokens_ptr": f"*{dtype}", "codes_ptr": "*u8", "output_ptr": f"*{dtype}"}
    types |= dict.fromkeys(("codebook_ptr", "in_scale_ptr", "out_scale_ptr"), "*fp32")
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in _kernel.arg_names}
    source = ASTSource(_kernel, signature, constexprs=constants)
    options = {"enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ("mma" in compiled.asm["ptx"]) == (tokens > 1 and dtype != "fp32")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernel_on_a_gpu(shape, dtype):
    from nowag_pl.kernels.cuda.vq import fused_matmul

    case = problem(*shape, dtype=getattr(torch, dtype), device="cuda")
    assert case.error(fused_matmul(*case)) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "size"), [(6, 4096), (4, 256)])
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 256])
def test_kernel_at_the_size_of_a_model(dim, size, num_tokens):
    from nowag_pl.kernels.cuda.vq import fused_matmul

    case = problem(4096, 11008, dim, size, num_tokens, torch.bfloat16, "cuda")
    assert case.error(fused_matmul(*case)) < 1e-2
