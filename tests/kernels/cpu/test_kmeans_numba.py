import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba")

from nowag_pl.functional.vq import nearest
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.kmeans_start import kmeans_plus_plus
from nowag_pl.functional.vq.nearest import row_minima
from nowag_pl.kernels import dispatch
from nowag_pl.kernels.cpu.kmeans import codeword_registers, find_nearest


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def search(features, right):
    codes = torch.full((len(features),), -1, dtype=torch.int32)
    distances = torch.full((len(features),), torch.nan)
    find_nearest(features, codeword_registers(right), codes, distances)
    return codes, distances


@given(
    num_points=st.integers(1, 40),
    num_codewords=st.integers(1, 130),
    seed=st.integers(0, 99),
)
def test_the_first_of_the_nearest_is_found(num_points, num_codewords, seed):
    generator = seeded(seed)
    features = torch.randint(-3, 4, (num_points, 6), generator=generator).float()  # exact, with many ties
    right = torch.randint(-3, 4, (6, num_codewords), generator=generator).float()
    codes, distances = search(features, right)
    products = (features @ right).tolist()
    assert distances.tolist() == [min(row) for row in products]
    assert codes.tolist() == [row.index(min(row)) for row in products]


@pytest.mark.parametrize("num_columns", [1, 63, 64, 4096, 8192])
def test_minima_of_rows_are_the_first(num_columns):
    matrix = torch.randint(-40, 40, (50, num_columns), generator=seeded()).float()
    values, columns = row_minima(matrix)
    assert values.tolist() == [min(row) for row in matrix.tolist()]
    assert columns.tolist() == [row.index(min(row)) for row in matrix.tolist()]


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_change_nothing(num_threads, monkeypatch):
    features, right = torch.randn(23, 6, generator=seeded()), torch.randn(6, 70, generator=seeded(1))
    expected = search(features, right)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    actual = search(features, right)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.fixture
def problem():
    points = torch.randn(600, 3, generator=seeded())
    return points, torch.exp(2 * torch.randn(600, 3, generator=seeded(1)))


def test_a_fit_is_that_without_numba(problem, monkeypatch):
    fits = []
    for has_numba in (True, False):
        monkeypatch.setitem(dispatch.PAYS_FROM, "distances", 0)
        monkeypatch.setattr(dispatch, "has_module", lambda name, found=has_numba: found)
        fits.append(weighted_kmeans(*problem, KMeansSettings(40, 20), seeded()))
    assert torch.equal(fits[0].codes, fits[1].codes)
    torch.testing.assert_close(fits[0].codebook, fits[1].codebook)
    assert fits[0].loss == pytest.approx(fits[1].loss, rel=1e-6)


def test_small_problems_and_long_codewords_are_left_to_torch(problem, monkeypatch):
    def refuse(name):
        raise AssertionError

    monkeypatch.setattr(dispatch, "has_module", refuse)
    assert weighted_kmeans(*problem, KMeansSettings(40, 1), seeded()).num_iters == 1
    monkeypatch.setitem(dispatch.PAYS_FROM, "distances", 600 * 40)
    with pytest.raises(AssertionError):
        weighted_kmeans(*problem, KMeansSettings(40, 1), seeded())
    monkeypatch.setattr(nearest, "NUMBA_MAX_DIM", 2)
    assert weighted_kmeans(*problem, KMeansSettings(40, 1), seeded()).num_iters == 1


def test_a_start_is_that_without_numba(problem, monkeypatch):
    starts = []
    for has_numba in (True, False):
        monkeypatch.setitem(dispatch.PAYS_FROM, "distances", 0)
        monkeypatch.setattr(dispatch, "has_module", lambda name, found=has_numba: found)
        starts.append([kmeans_plus_plus(*problem, count, seeded()) for count in (30, 3)])  # 3: from 192 of 600 points
    assert torch.equal(starts[0][0], starts[1][0])
    assert torch.equal(starts[0][1], starts[1][1])
