import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.modules import CrossMoment


@given(batches=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_mean_of_products_is_that_of_a_loop(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    moment, expected, count = CrossMoment(2, 3), torch.zeros(2, 3, dtype=torch.float64), 0
    for batch in batches:
        rows = torch.randn(batch, 5, 2, generator=generator)
        columns = torch.randn(batch, 5, 3, generator=generator)
        moment.update(rows, columns)
        for a, b in zip(rows.flatten(0, 1).double(), columns.flatten(0, 1).double(), strict=True):
            expected += torch.outer(a, b)
            count += 1
    assert int(moment.num_tokens) == count
    assert moment.compute().dtype == torch.float32
    torch.testing.assert_close(moment.compute().double(), expected / count, rtol=1e-5, atol=1e-6)


def test_tokens_without_a_batch_are_one_sequence():
    rows, columns = torch.randn(6, 2), torch.randn(6, 3)
    moment = CrossMoment(2, 3)
    moment.update(rows.bfloat16(), columns)
    torch.testing.assert_close(moment.compute(), rows.bfloat16().float().T @ columns / 6)


def test_different_tokens_are_refused():
    with pytest.raises(ValueError, match="zip"):
        CrossMoment(2, 3).update(torch.ones(2, 5, 2), torch.ones(3, 5, 3))
