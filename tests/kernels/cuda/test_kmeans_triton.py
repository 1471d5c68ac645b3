import pytest
import torch
from triton_interpreter import interpreted

pytest.importorskip("triton")

from kmeans_cases import problem, search

from nowag_pl.functional.vq.kmeans import KMeansSettings, add_sorted, weighted_kmeans

CASES = [(150, 6, 200), (70, 3, 64), (64, 9, 65), (5, 1, 2), (33, 4, 1)]  # points, d, k; none, some and all fill tiles


@pytest.fixture(scope="module")
def results():
    """Codes, distances and doubts of all cases, from Triton's interpreter."""
    return interpreted("kmeans_cases.py", CASES)


def check(features, right, codes, distances):
    """The product of each point with its codeword is the smallest, and of equal codewords the first is taken."""
    products = features.double() @ right.double()
    chosen = products.gather(1, codes.long()[:, None]).squeeze(1)
    sizes = features.double().abs() @ right.double().abs()
    assert (chosen - products.min(dim=1).values <= 1e-6 * sizes.gather(1, codes.long()[:, None]).squeeze(1)).all()
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-5, atol=1e-4)
    first_equal = (right.T[:, None] == right.T[None]).all(dim=2).long().argmax(dim=1)
    assert torch.equal(first_equal[codes.long()], codes.long())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_search_in_the_interpreter(case, results):
    codes, distances, doubtful = (torch.tensor(values) for values in results[case])
    features, right = problem(*case)
    check(features, right, codes, distances)
    assert not codes[features.abs().sum(dim=1) == 0].any()
    values = (features.double() @ right.double()).topk(min(2, case[2]), dim=1, largest=False).values
    if case[2] > 1:
        gap = values[:, 1] - values[:, 0]
        assert doubtful[gap == 0].all()
        assert doubtful.float().mean() < (gap < 1e-3).float().mean() + 0.02


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        (80, "tf32x3"),
        (90, "tf32x3"),
        pytest.param(90, "ieee", marks=pytest.mark.slow),
    ],
)
def test_kernel_compiles_for_gpus(capability, precision):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nowag_pl.kernels.cuda.kmeans import _kernel

    constants = {"DIM": 6, "WIDTH": 16, "POINTS": 64, "CODEWORDS": 64, "PRECISION": precision, "ERROR": 2.0**-18}
    types = {"codes_ptr": "*i32", "doubtful_ptr": "*i1"}
    types |= dict.fromkeys(("features_ptr", "codewords_ptr", "distances_ptr"), "*fp32")
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in _kernel.arg_names}
    source = ASTSource(_kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
    assert ("tf32" in compiled.asm["ptx"]) == (precision == "tf32x3")


def test_sums_of_sorted_features():
    generator = torch.Generator().manual_seed(0)
    codes, features = torch.randint(9, (200,), generator=generator), torch.randn(200, 5, generator=generator)
    codes[codes == 4] = 5  # without points
    sums = torch.ones(10, 5)
    add_sorted(sums, codes, features)
    torch.testing.assert_close(sums, torch.ones(10, 5).index_add_(0, codes, features))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (100_000, 6, 4096)], ids=str)
def test_search_on_a_gpu(case):
    from nowag_pl.kernels.cuda.kmeans import find_nearest

    features, right = problem(*case, device="cuda")
    codes, distances, _ = search(find_nearest, features, right)
    check(features[:1000], right, codes[:1000], distances[:1000])


@pytest.mark.gpu
def test_a_fit_on_a_gpu_is_that_on_a_cpu_and_always_the_same():
    points = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    settings, generator = KMeansSettings(256, max_iters=20), torch.Generator()
    fits = [
        weighted_kmeans(points.to(d), weights.to(d), settings, generator, points[:256].to(d)) for d in ("cuda",) * 2
    ]
    on_cpu = weighted_kmeans(points, weights, settings, generator, points[:256])
    assert torch.equal(fits[0].codebook, fits[1].codebook)
    assert fits[0].loss == pytest.approx(on_cpu.loss, rel=1e-3)
