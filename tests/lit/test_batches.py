"""Batches that are the same on any number of ranks, and loaders that resume inside an epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from nowag_pl.lit.batches import ResumableLoader, SharedBatches


def shares(num_items, batch_size, world_size, seed=None, epoch=0):
    """Return for every batch what each rank gets."""
    samplers = [SharedBatches(num_items, batch_size, rank, world_size, seed) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return list(zip(*map(list, samplers), strict=True))


@given(num_items=st.integers(1, 40), batch_size=st.integers(1, 12), world_size=st.integers(1, 5))
def test_every_item_counts_once_and_equally_within_its_batch(num_items, batch_size, world_size):
    seen = []
    for batch in shares(num_items, batch_size, world_size, seed=3):
        assert len({len(share.indices) for share in batch}) == 1  # no rank waits for another
        real = [
            (index, weight)
            for share in batch
            for index, weight in zip(share.indices, share.weights, strict=True)
            if weight
        ]
        seen += [index for index, _ in real]
        mean = sum(weight * index for index, weight in real) / world_size  # as DDP averages gradients
        assert mean == pytest.approx(sum(index for index, _ in real) / len(real))
    assert sorted(seen) == list(range(num_items))


@given(num_items=st.integers(1, 30), batch_size=st.integers(1, 8), world_size=st.integers(2, 4))
def test_batches_are_those_of_one_rank(num_items, batch_size, world_size):
    one = shares(num_items, batch_size, 1, seed=1, epoch=2)
    many = shares(num_items, batch_size, world_size, seed=1, epoch=2)
    for (whole,), parts in zip(one, many, strict=True):
        real = {i for part in parts for i, weight in zip(part.indices, part.weights, strict=True) if weight}
        assert real == set(whole.indices)


def test_without_seed_the_order_is_that_of_the_items():
    assert [share.indices for (share,) in shares(5, 2, 1)] == [[0, 1], [2, 3], [4]]


def test_order_changes_with_epoch_and_seed():
    orders = [
        [index for (share,) in shares(20, 4, 1, seed, epoch) for index in share.indices]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


class Items(Dataset):
    def __getitem__(self, share):
        return torch.tensor(share.indices)


def loader() -> ResumableLoader:
    return ResumableLoader(Items(), SharedBatches(10, 3, seed=0))


@pytest.mark.parametrize("done", range(5))
def test_loader_goes_on_behind_what_was_handed_out(done):
    whole = [batch.tolist() for batch in loader()]
    first, iterator = loader(), None
    iterator = iter(first)
    assert [next(iterator).tolist() for _ in range(done)] == whole[:done]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == (whole[done:] or whole)  # behind the last, the next epoch
    assert len(list(second)) == 4  # the next epoch is whole


def test_length_is_the_number_of_batches():
    assert len(loader()) == 4
