import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional import thresholds
from nowag_pl.functional.pruning import keep_largest
from nowag_pl.functional.thresholds import kth_smallest, mark_largest


def largest(values, num_kept):
    order = sorted(range(len(values)), key=lambda j: (-values[j], j))[:num_kept]
    return [j in order for j in range(len(values))]


@given(
    count=st.integers(100, 700),
    share=st.floats(0.01, 0.99),
    margin=st.integers(0, 9),
    levels=st.sampled_from([3, 50, 10**6]),
    num_equal=st.integers(0, 100),
    num_threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_the_largest_are_marked_in_one_pass_or_not_at_all(count, share, margin, levels, num_equal, num_threads, seed):
    values = torch.randint(-levels, levels, (count,), generator=torch.Generator().manual_seed(seed)).float()
    values[:num_equal] = 0
    num_removed = max(round(share * count), 1)
    keep = torch.zeros(count, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "MIN_SAMPLED", 0)
        patch.setattr(thresholds, "SAMPLE_SIZE", 64)
        patch.setattr(thresholds, "SAMPLE_MARGIN", margin)
        patch.setattr(torch, "get_num_threads", lambda: num_threads)
        marked = mark_largest(values, num_removed, keep)
        whole = keep_largest(values[None], num_removed / count)[0]
    expected = largest(values.tolist(), count - num_removed)
    assert not marked or keep.tolist() == expected
    assert whole.tolist() == expected


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_one_pass_is_enough_for_a_matrix(sparsity, generator):
    scores = (torch.rand(1024, generator=generator) * torch.randn(1024, 1024, generator=generator).square()).view(-1)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    num_removed = round(sparsity * len(scores))
    assert mark_largest(scores, num_removed, keep)
    assert int(keep.sum()) == len(scores) - num_removed
    assert scores[keep].min() >= scores[~keep].max()


@given(count=st.integers(1, 200), data=st.data(), seed=st.integers(0, 99))
def test_kth_smallest_is_that_of_a_sorted_list(count, data, seed):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul_(3).round_().div_(3)
    k = data.draw(st.integers(1, count))
    assert kth_smallest(values, k).item() == sorted(values.tolist())[k - 1]
