"""Mixed text takes pieces of each source in turn, by shares of the tokens, and repeats nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.data.mixture import TextPart, mixed
from nowag_pl.data.sources import HubDataset

PARTS = st.tuples(st.integers(5, 60), st.floats(0.1, 5.0), st.integers(1, 5))


@given(st.lists(PARTS, min_size=1, max_size=4))
def test_every_beginning_has_the_shares_up_to_a_piece(parts):
    sizes, shares, lengths = zip(*parts, strict=True)
    streams = [torch.arange(size) + 1000 * number for number, size in enumerate(sizes)]
    stream = mixed(streams, shares, lengths)
    owner = stream // 1000
    for number in range(len(parts)):
        own = stream[owner == number]
        # In order, nothing twice.
        assert torch.equal(own, streams[number][: len(own)])
    share = torch.tensor(shares) / sum(shares)
    counts = torch.stack([owner == number for number in range(len(parts))]).cumsum(dim=1)
    ahead = counts / share[:, None]  # of the tokens that each part stands for
    ends = (owner[1:] != owner[:-1]).nonzero().flatten()
    slack = max(length / each for length, each in zip(lengths, share.tolist(), strict=True))
    assert all(float(ahead[:, end].max() - ahead[:, end].min()) <= 2 * slack + 1e-3 for end in ends.tolist())


def test_a_part_that_is_too_short_is_named():
    with pytest.raises(ValueError, match="part 1: Expected text of at least 5 tokens, but got 3"):
        mixed([torch.arange(9), torch.arange(3)], [1.0, 1.0], [5, 5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither"),
        ({"files": "a.txt", "dataset": HubDataset("b")}, "both"),
        ({"files": "a.txt", "share": 0.0}, "share"),
        ({"files": "a.txt", "length": 1}, "length"),
    ],
)
def test_parts_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextPart(**settings)
