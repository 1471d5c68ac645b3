from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.patterns import check_pattern
from nowag_pl.functional.pruning import (
    check_sparsity,
    keep_largest,
    keep_n_of_m,
    keep_structured,
    nowag_scores,
    wanda_scores,
)

PATTERNS = [(1, 4), (3, 4), (2, 4), (4, 8), (1, 1), (4, 4), (2, 3), (7, 20)]


def scalar_keep(scores, num_kept):
    """Keep the largest of a list; of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return [j in order[:num_kept] for j in range(len(scores))]


def tied_scores(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (rows, columns), generator=generator).float()


def test_nowag_scores_equal_scalar_loops(generator):
    weight, second_moment = torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator)
    scores = nowag_scores(weight, second_moment)
    for i in range(4):
        for j in range(6):
            expected = float(second_moment[j]) * float(weight[i, j]) ** 2
            assert scores[i, j].item() == pytest.approx(expected, rel=1e-6)


def test_wanda_scores_equal_scalar_loops(generator):
    weight, second_moment = torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator)
    scores = wanda_scores(weight, second_moment)
    for i in range(4):
        for j in range(6):
            expected = abs(float(weight[i, j])) * sqrt(float(second_moment[j]))
            assert scores[i, j].item() == pytest.approx(expected, rel=1e-6)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 30),
    sparsity=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
)
def test_keep_largest_equals_sorting_each_row(rows, columns, sparsity, seed):
    scores = tied_scores(rows, columns, seed)
    before = scores.clone()
    num_kept = columns - round(sparsity * columns)
    expected = [scalar_keep(row, num_kept) for row in scores.tolist()]
    assert keep_largest(scores, sparsity).tolist() == expected
    assert torch.equal(scores, before)


def test_keep_largest_over_a_matrix_settles_ties_in_row_major_order():
    scores = torch.tensor([[1.0, 2.0, 1.0], [1.0, 5.0, 1.0]])
    keep = keep_largest(scores.view(1, -1), 0.5).view(2, 3)
    assert keep.tolist() == [[True, True, False], [False, True, False]]


def test_keep_largest_removes_nothing_at_sparsity_zero():
    assert keep_largest(torch.zeros(2, 5), 0.0).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@given(rows=st.integers(1, 5), num_groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_keep_n_of_m_equals_sorting_each_group(pattern, rows, num_groups, seed):
    num_kept, size = pattern
    scores = tied_scores(rows, num_groups * size, seed)
    before = scores.clone()
    expected = [
        [kept for start in range(0, len(row), size) for kept in scalar_keep(row[start : start + size], num_kept)]
        for row in scores.tolist()
    ]
    assert keep_n_of_m(scores, pattern).tolist() == expected
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ((1, 4), [False, False, True, False]),
        ((2, 4), [True, False, True, False]),
        ((3, 4), [True, False, True, True]),
    ],
)
def test_n_counts_kept_weights(pattern, expected):
    assert keep_n_of_m(torch.tensor([[3.0, 1.0, 4.0, 2.0]]), pattern).tolist() == [expected]


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    sparsity=st.floats(0, 1, exclude_max=True),
    dim=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_keep_structured_equals_sorting_sums(rows, columns, sparsity, dim, seed):
    scores = tied_scores(rows, columns, seed)
    before = scores.clone()
    lines = scores.tolist() if dim == 0 else scores.T.tolist()
    kept = scalar_keep([sum(line) for line in lines], len(lines) - round(sparsity * len(lines)))
    expected = [[kept[i] if dim == 0 else kept[j] for j in range(columns)] for i in range(rows)]
    keep = keep_structured(scores, sparsity, dim)
    assert keep.tolist() == expected
    assert keep.is_contiguous()
    assert torch.equal(scores, before)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan")])
def test_sparsity_out_of_range_is_refused(sparsity):
    match = rf"Expected sparsity .*removed.* in \[0, 1\), but got {sparsity}"
    for refuse in (
        lambda: check_sparsity(sparsity),
        lambda: keep_largest(torch.zeros(2, 2), sparsity),
        lambda: keep_structured(torch.zeros(2, 2), sparsity, dim=0),
    ):
        with pytest.raises(ValueError, match=match):
            refuse()


@pytest.mark.parametrize("pattern", [(0, 4), (5, 4), (-1, 4), (0, 0)])
def test_pattern_out_of_range_is_refused(pattern):
    with pytest.raises(ValueError, match=r"1 <= N <= M, but got \(-?\d, \d\)"):
        check_pattern(pattern)
    with pytest.raises(ValueError, match="1 <= N <= M"):
        keep_n_of_m(torch.zeros(2, 8), pattern)


def test_pattern_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match="divisible by 4 for the pattern 2:4, but got 6"):
        keep_n_of_m(torch.zeros(2, 6), (2, 4))
