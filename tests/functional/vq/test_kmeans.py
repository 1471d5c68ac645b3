from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from largest_tensor import LargestTensor

from nowag_pl.functional.chunks import CHUNK_ELEMENTS
from nowag_pl.functional.vq import kmeans, kmeans_start, nearest
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.kmeans_start import START_POINTS_PER_CODEWORD, kmeans_plus_plus
from nowag_pl.functional.vq.quantized import SubvectorWeights


def scalar_distance(point, weight, codeword):
    return sum(w * (x - c) ** 2 for x, w, c in zip(point, weight, codeword, strict=True))


def scalar_assign(points, weights, codebook):
    codes, loss = [], 0.0
    for point, weight in zip(points, weights, strict=True):
        distances = [scalar_distance(point, weight, codeword) for codeword in codebook]
        codes.append(distances.index(min(distances)))
        loss += min(distances)
    return codes, loss


def scalar_update(points, weights, codes, codebook):
    updated = [list(codeword) for codeword in codebook]
    for code in range(len(codebook)):
        members = [i for i, member_code in enumerate(codes) if member_code == code]
        for j in range(len(codebook[0])):
            mass = sum(weights[i][j] for i in members)
            if mass > 0:
                updated[code][j] = sum(weights[i][j] * points[i][j] for i in members) / mass
    return updated


def random_problem(num_points, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, dim, generator=generator)
    return points, torch.rand(num_points, dim, generator=generator) + 0.05


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_codewords", [1, 3, 4, 6, 7, 64, 96])
def test_assignment_equals_scalar_loops(num_codewords):
    points, weights = random_problem(150, 3)
    codebook = torch.randn(num_codewords, 3, generator=seeded(1))
    result = weighted_kmeans(points, weights, KMeansSettings(num_codewords, max_iters=0), seeded(), codebook=codebook)
    codes, loss = scalar_assign(points.tolist(), weights.tolist(), codebook.tolist())
    assert result.codes.tolist() == codes
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert torch.equal(result.codebook, codebook)
    assert result.num_iters == 0


def test_one_iteration_equals_scalar_loops():
    points, weights = random_problem(23, 3)
    codebook = points[:4].clone()
    result = weighted_kmeans(points, weights, KMeansSettings(4, max_iters=1), seeded(), codebook=codebook)
    lists = points.tolist(), weights.tolist()
    updated = scalar_update(*lists, scalar_assign(*lists, codebook.tolist())[0], codebook.tolist())
    codes, loss = scalar_assign(*lists, updated)
    torch.testing.assert_close(result.codebook, torch.tensor(updated), rtol=1e-5, atol=1e-6)
    assert result.codes.tolist() == codes
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.num_iters == 1


def test_weights_decide_assignment_and_mean():
    points, weights = torch.tensor([[0.0, 0.0], [4.0, 4.0]]), torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    result = weighted_kmeans(points, weights, KMeansSettings(1), seeded(), codebook=torch.zeros(1, 2))
    assert result.codebook.tolist() == [[1.0, 3.0]]


@given(
    num_points=st.integers(1, 60),
    dim=st.integers(1, 6),
    seed=st.integers(0, 99),
    fraction=st.floats(0.01, 1),
)
def test_loss_is_that_of_codebook_and_codes_and_inputs_stay(num_points, dim, seed, fraction):
    points, weights = random_problem(num_points, dim, seed)
    before = points.clone(), weights.clone()
    num_codewords = max(1, int(fraction * num_points))
    result = weighted_kmeans(points, weights, KMeansSettings(num_codewords, max_iters=5), seeded(seed))
    loss = (weights.double() * (points - result.codebook[result.codes]).double().square()).sum()
    assert result.codebook.shape == (num_codewords, dim)
    assert result.codes.dtype == torch.int32
    assert result.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-5 * num_points)
    assert torch.equal(points, before[0])
    assert torch.equal(weights, before[1])


def test_given_codebook_is_not_written():
    points, weights = random_problem(20, 2)
    codebook = torch.tensor([[0.0, 0.0], [9.0, 9.0]])  # the second is unused and reseeded
    weighted_kmeans(points, weights, KMeansSettings(2), seeded(), codebook=codebook)
    assert codebook.tolist() == [[0.0, 0.0], [9.0, 9.0]]


def test_loss_never_rises_and_fit_settles():
    points, weights = random_problem(200, 2)
    codebook = points[:12].clone()
    fits = [
        weighted_kmeans(points, weights, KMeansSettings(12, max_iters=n), seeded(), codebook=codebook)
        for n in range(40)
    ]
    losses = [fit.loss for fit in fits]
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert [fit.num_iters for fit in fits[:3]] == [0, 1, 2]
    assert fits[-1].num_iters < 39
    again = weighted_kmeans(points, weights, KMeansSettings(12), seeded(), codebook=fits[-1].codebook)
    assert torch.equal(again.codes, fits[-1].codes)


def test_tolerance_stops_at_the_first_small_gain():
    points, weights = random_problem(200, 2)
    codebook = points[:12].clone()
    losses = [
        weighted_kmeans(points, weights, KMeansSettings(12, max_iters=n), seeded(), codebook=codebook).loss
        for n in range(30)
    ]
    gains = [(before - after) / before for before, after in pairwise(losses)]
    for tolerance in (0.3, 0.05, 0.01):
        expected = next(n for n, gain in enumerate(gains, start=1) if gain <= tolerance)
        result = weighted_kmeans(points, weights, KMeansSettings(12, tolerance=tolerance), seeded(), codebook=codebook)
        assert result.num_iters == expected
        assert result.loss == losses[expected]


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 150, 1000])
def test_chunks_change_nothing(chunk_size):
    points, weights = random_problem(150, 3)
    expected = weighted_kmeans(points, weights, KMeansSettings(10), seeded())
    actual = weighted_kmeans(points, weights, KMeansSettings(10, chunk_size=chunk_size), seeded())
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.codebook, expected.codebook)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6)


def test_seed_decides_all():
    points, weights = random_problem(300, 2)
    first, same, other = (weighted_kmeans(points, weights, KMeansSettings(8), seeded(seed)) for seed in (3, 3, 4))
    assert first.codebook.numpy().tobytes() == same.codebook.numpy().tobytes()
    assert torch.equal(first.codes, same.codes)
    assert first.loss == same.loss
    assert not torch.equal(first.codebook, other.codebook)


def test_global_random_state_is_left_alone():
    points, weights = random_problem(300, 2)
    before = torch.get_rng_state()
    weighted_kmeans(points, weights, KMeansSettings(2), seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_unused_codeword_goes_to_the_worst_point():
    points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    codebook = torch.tensor([[0.5], [1000.0]])
    result = weighted_kmeans(points, torch.ones(4, 1), KMeansSettings(2, max_iters=1), seeded(), codebook=codebook)
    assert result.codebook.tolist() == [[5.75], [12.0]]
    assert result.codes.tolist() == [0, 0, 1, 1]


def test_several_unused_codewords_go_to_different_points():
    points = torch.tensor([[0.0], [1.0], [20.0], [-30.0]])
    codebook = torch.tensor([[0.0], [1e3], [2e3]])
    result = weighted_kmeans(points, torch.ones(4, 1), KMeansSettings(3, max_iters=1), seeded(), codebook=codebook)
    assert sorted(result.codebook[1:].flatten().tolist()) == [-30.0, 20.0]


def test_coordinates_without_weight_do_not_move():
    points, weights = torch.tensor([[0.0, 100.0], [2.0, -100.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    result = weighted_kmeans(points, weights, KMeansSettings(1), seeded(), codebook=torch.tensor([[5.0, 7.0]]))
    assert result.codebook.tolist() == [[1.0, 7.0]]
    assert result.loss == 2.0


def test_reseeded_codeword_keeps_coordinates_without_weight():
    points = torch.tensor([[0.0, 3.0], [0.0, 3.0], [9.0, 4.0]])
    weights = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    codebook = torch.tensor([[0.0, 5.0], [1e3, 6.0]])
    result = weighted_kmeans(points, weights, KMeansSettings(2, max_iters=1), seeded(), codebook=codebook)
    assert result.codebook.tolist() == [[3.0, 5.0], [9.0, 6.0]]


def test_all_weights_zero_costs_nothing():
    points, _ = random_problem(9, 2)
    result = weighted_kmeans(points, torch.zeros(9, 2), KMeansSettings(4), seeded())
    assert result.loss == 0
    assert result.codebook.isfinite().all()


def test_a_codeword_for_every_point_is_exact():
    points, weights = random_problem(6, 2)
    assert weighted_kmeans(points, weights, KMeansSettings(6), seeded()).loss == pytest.approx(0, abs=1e-5)


def test_fewer_points_than_codewords_are_refused():
    points, weights = random_problem(3, 2)
    with pytest.raises(ValueError, match=r"4 codewords for 3 subvectors. Use a smaller codebook_size"):
        weighted_kmeans(points, weights, KMeansSettings(4), seeded())


def start_probabilities(points, weights, num_codewords) -> dict[tuple[int, ...], float]:
    """Return the probability of each order of codewords when each is drawn by the distances from all before it."""
    chances = {(): 1.0}
    for _ in range(num_codewords):
        longer = {}
        for chosen, chance in chances.items():
            distances = [
                min((scalar_distance(point, weight, points[codeword]) for codeword in chosen), default=1.0)
                for point, weight in zip(points, weights, strict=True)
            ]
            for index, distance in enumerate(distances):
                if distance > 0:
                    longer[(*chosen, index)] = chance * distance / sum(distances)
        chances = longer
    return chances


def test_start_has_the_probabilities_of_one_draw_after_the_other():
    points, weights = random_problem(5, 2, seed=3)
    expected = start_probabilities(points.tolist(), weights.tolist(), 4)  # the last two are drawn at once
    generator, count = seeded(), 500
    observed = Counter(
        tuple((points == codeword).all(dim=1).nonzero().item() for codeword in start)
        for start in (kmeans_plus_plus(points, weights, 4, generator) for _ in range(count))
    )
    assert observed.keys() <= expected.keys()
    chi_square = sum((observed[key] - count * chance) ** 2 / (count * chance) for key, chance in expected.items())
    freedom = len(expected) - 1
    assert freedom == 119
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_start_finds_every_cluster_in_few_passes(monkeypatch):
    centers = 1000 * torch.randn(300, 4, generator=seeded())
    points = (centers[:, None] + torch.randn(300, 10, 4, generator=seeded(1))).flatten(0, 1)
    searches = []
    monkeypatch.setattr(kmeans_start, "search", lambda *args: (searches.append(0), nearest.search(*args))[1])
    start = kmeans_plus_plus(points, torch.ones_like(points), 300, seeded(2))
    assert torch.cdist(start, centers).argmin(dim=1).unique().numel() == 300
    assert len(searches) < 40


@pytest.mark.parametrize("seed", range(8))
def test_start_looks_only_at_weighted_coordinates(seed):
    points = torch.tensor([[0.0, 0.0], [0.0, 50.0], [3.0, 0.0], [0.0, -50.0]])
    weights = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    start = kmeans_plus_plus(points, weights, 2, seeded(seed))
    assert sorted(start[:, 0].tolist()) == [0.0, 3.0]


def test_start_from_a_sample_of_many_points():
    num_points = 3 * START_POINTS_PER_CODEWORD
    points, weights = random_problem(num_points, 2)
    start = kmeans_plus_plus(points, weights, 2, seeded())
    assert start.shape == (2, 2)
    assert all((codeword == points).all(dim=1).any() for codeword in start)
    assert torch.equal(start, kmeans_plus_plus(points, weights, 2, seeded()))


def test_start_from_equal_points():
    start = kmeans_plus_plus(torch.ones(5, 2), torch.ones(5, 2), 3, seeded())
    assert start.tolist() == [[1.0, 1.0]] * 3


def test_no_features_and_no_weights_of_all_points_are_made():
    num_points, dim = 2**17, 16
    columns = torch.rand(8, dim, generator=seeded()) + 0.1
    weights = SubvectorWeights(columns, torch.rand(num_points // 8, generator=seeded()) + 0.1)
    points = torch.randn(num_points, dim, generator=seeded())
    with LargestTensor() as largest:
        result = weighted_kmeans(points, weights, KMeansSettings(2, max_iters=2), seeded())
    assert result.num_iters == 2
    assert CHUNK_ELEMENTS / 2 < largest.elements <= CHUNK_ELEMENTS < points.numel()


@pytest.mark.parametrize("with_rows", [True, False])
def test_weights_of_columns_and_rows_equal_those_of_all_points(with_rows):
    points, _ = random_problem(3 * 70, 2)
    columns = torch.rand(3, 2, generator=seeded(1)) + 0.05
    rows = torch.rand(70, generator=seeded(2)) + 0.05 if with_rows else torch.ones(70)
    full = torch.stack([rows[i // 3] * columns[i % 3] for i in range(210)])
    actual = weighted_kmeans(
        points, SubvectorWeights(columns, rows if with_rows else None), KMeansSettings(3), seeded()
    )
    expected = weighted_kmeans(points, full, KMeansSettings(3), seeded())
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.codebook, expected.codebook)
    assert actual.loss == expected.loss


def test_parts_of_points_change_nothing(monkeypatch):
    points, weights = random_problem(150, 3)
    codebook = torch.cat([points[:8], torch.full((2, 3), 1e3)])  # two are unused
    expected = weighted_kmeans(points, weights, KMeansSettings(10), seeded(), codebook=codebook)
    monkeypatch.setattr(kmeans, "CHUNK_ELEMENTS", 40)
    actual = weighted_kmeans(points, weights, KMeansSettings(10, chunk_size=3), seeded(), codebook=codebook)
    assert torch.equal(actual.codes, expected.codes)
    torch.testing.assert_close(actual.codebook, expected.codebook)
    assert actual.loss == pytest.approx(expected.loss, rel=1e-6)
