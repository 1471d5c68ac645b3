import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trellis_oracle import least_cost

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.paths import find_path_by_tensors, open_path, tail_biting_path
from nowag_pl.kernels.cpu.trellis import find_path

SEARCHES = {"numba": find_path, "tensors": find_path_by_tensors}
BRUTE = [  # L, k, steps
    (4, 1, 6),
    (5, 3, 3),
    (6, 2, 4),
    (4, 4, 2),
]


def problem(state_bits, bits, steps, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, steps, generator=generator)
    weights = torch.rand(count, steps, generator=generator)
    bounds = torch.randint(0, 2 ** (state_bits - bits), (2, count), generator=generator, dtype=torch.int32)
    return targets, weights, code_values("mul1", state_bits), *bounds


def costs(states, targets, weights, values):
    return (weights * (targets - values[states.long()]).square()).sum(dim=1)


def is_path(states, bits, state_bits):
    kept = 2 ** (state_bits - bits)
    return torch.equal(states[:, 1:] >> bits, states[:, :-1] % kept)


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize(("state_bits", "bits", "steps"), BRUTE)
def test_no_path_is_cheaper(name, state_bits, bits, steps):
    targets, weights, values, starts, _ = problem(state_bits, bits, steps)
    # Ends that can be reached from the starts in so few steps.
    ends = SEARCHES[name](targets, weights.sqrt(), values, bits, starts, None)[:, -1] % 2 ** (state_bits - bits)
    for start, end in ((None, None), (starts, None), (starts, ends), (None, ends)):
        states = SEARCHES[name](targets, weights.sqrt(), values, bits, start, end)
        assert states.dtype == torch.int32
        assert is_path(states, bits, state_bits)
        assert start is None or torch.equal(states[:, 0] >> bits, start)
        assert end is None or torch.equal(states[:, -1] % 2 ** (state_bits - bits), end)
        for index, cost in enumerate(costs(states, targets, weights, values)):
            bounds = [None if each is None else int(each[index]) for each in (start, end)]
            least = least_cost(targets[index].tolist(), weights[index].tolist(), values.tolist(), bits, *bounds)
            assert cost.item() == pytest.approx(least, rel=1e-5)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([(4, 4), (7, 5), (11, 2)]), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_both_searches_agree(sizes, steps, weighted, seed):
    state_bits, bits = sizes
    targets, weights, values, starts, _ = problem(state_bits, bits, steps, seed=seed)
    roots = weights.sqrt() if weighted else None
    first, second = (search(targets, roots, values, bits, starts, None) for search in SEARCHES.values())
    weights = weights if weighted else torch.ones_like(weights)
    torch.testing.assert_close(*(costs(each, targets, weights, values) for each in (first, second)))


def test_ones_are_the_default_weights():
    targets, _, values, starts, ends = problem(8, 2, 20)
    assert torch.equal(
        open_path(targets, values, 2, torch.ones_like(targets), starts, ends),
        open_path(targets, values, 2, None, starts, ends),
    )


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(num_threads):
    targets, weights, values, *_ = problem(10, 3, 32, count=7)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        found = tail_biting_path(targets, values, 3, weights)
    finally:
        torch.set_num_threads(before)
    expected = torch.cat(
        [
            tail_biting_path(*pair[:1], values, 3, pair[1])
            for pair in zip(targets[:, None], weights[:, None], strict=True)
        ]
    )
    assert torch.equal(found, expected)


def test_memory_changes_nothing(monkeypatch):
    targets, weights, values, starts, ends = problem(8, 2, 16, count=5)
    expected = open_path(targets, values, 2, weights, starts, ends)
    monkeypatch.setattr("nowag_pl.functional.trellis.paths.has_module", lambda name: False)
    for memory in (1, 20_000, 2**30):
        assert torch.equal(open_path(targets, values, 2, weights, starts, ends, memory), expected)
    assert open_path(targets[:0], values, 2).shape == (0, 16)


@pytest.mark.parametrize(("state_bits", "bits", "steps"), [(4, 1, 8), (5, 1, 9), (4, 2, 5), (6, 2, 6)])
def test_circular_paths_are_near_the_cheapest(state_bits, bits, steps):
    targets, weights, values, *_ = problem(state_bits, bits, steps, count=12)
    states = tail_biting_path(targets, values, bits, weights)
    assert is_path(torch.cat([states[:, -1:], states], dim=1), bits, state_bits)
    found = costs(states, targets, weights, values)
    least = torch.tensor(
        [
            least_cost(x.tolist(), w.tolist(), values.tolist(), bits, "circular")
            for x, w in zip(targets, weights, strict=True)
        ]
    )
    assert (found >= least * (1 - 1e-5)).all()
    # The sequences are hardly longer than a state: half of them find the best seam all the same.
    assert (found <= least * (1 + 1e-5)).float().mean() >= 0.4


def test_weights_move_the_error_to_where_it_counts_less():
    targets, _, values, *_ = problem(10, 2, 256, count=8)
    weights = torch.where(torch.arange(256) % 2 == 0, 9.0, 1.0).expand_as(targets)
    errors = (targets - values[tail_biting_path(targets, values, 2, weights).long()]).square()
    assert 2 * errors[:, ::2].mean() < errors[:, 1::2].mean()


# The error at 4 bits is published with two digits.
@pytest.mark.parametrize(
    ("bits", "error", "tolerance"),
    [
        (2, 0.0733, 0.005),
        (4, 0.0055, 0.03),
        pytest.param(1, 0.2803, 0.005, marks=pytest.mark.slow),
        pytest.param(3, 0.0198, 0.005, marks=pytest.mark.slow),
    ],
)
def test_gaussian_table_of_the_paper(bits, error, tolerance):
    """QTIP's trellis of 2^12 random numbers, as they are drawn: the published errors."""
    generator = torch.Generator().manual_seed(0)
    values, targets = torch.randn(2**12, generator=generator), torch.randn(800, 256, generator=generator)
    found = (targets - values[tail_biting_path(targets, values, bits).long()]).square().mean()
    assert found / targets.square().mean() == pytest.approx(error, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("state_bits", "count", "spread", "error"), [(12, 800, 1.02, 0.0733), (16, 150, 1.02, 0.0703)])
def test_gaussian_error_at_two_bits(state_bits, count, spread, error):
    values = code_values("mul1", state_bits) * spread
    targets = torch.randn(count, 256, generator=torch.Generator().manual_seed(1))
    found = (targets - values[tail_biting_path(targets, values, 2).long()]).square().mean()
    assert found / targets.square().mean() <= error * 1.005


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (torch.ones(5), 1, r"Expected 2\^L values, but got 5."),
        (torch.ones(16), 5, r"Expected bits in \[1, 4\], but got 5."),
        (torch.ones(16), 0, r"Expected bits in \[1, 4\], but got 0."),
    ],
)
def test_messages(values, bits, message):
    with pytest.raises(ValueError, match=message):
        open_path(torch.ones(1, 8), values, bits)


def test_message_of_short_sequences():
    with pytest.raises(ValueError, match="at least 8 bits, but got 3 steps of 2"):
        tail_biting_path(torch.ones(1, 3), torch.ones(256), 2)
