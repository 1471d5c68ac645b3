"""Work in chunks: no chunk size changes a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nowag_pl.functional import chunks
from nowag_pl.functional.chunks import row_chunks
from nowag_pl.functional.normalization import normalize, norms
from nowag_pl.functional.objective import normalized_loss, reconstruction_loss
from nowag_pl.functional.pruning import (
    keep_largest,
    keep_n_of_m,
    keep_structured,
    kept_values,
    kth_smallest,
    wanda_scores,
)
from nowag_pl.functional.storage.packing import pack, pack_keep, unpack, unpack_keep

SIZES = [3, 16, 40]


def with_chunks(size, compute):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", size)
        return compute()


@pytest.mark.parametrize(("rows", "columns", "size"), [(5, 4, 8), (5, 4, 3), (4, 4, 16), (0, 4, 8), (3, 0, 8)])
def test_row_chunks_cover_every_row_once_within_the_size(rows, columns, size):
    slices = with_chunks(size, lambda: [*row_chunks(rows, columns)])
    covered = [[*range(rows)[each]] for each in slices]
    assert [row for each in covered for row in each] == [*range(rows)]
    assert all(len(each) * columns <= max(size, columns) for each in covered)


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=12)
@given(rows=st.integers(1, 7), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_chunks_change_nothing(size, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 4 * groups, generator=generator)
    second_moment = torch.rand(4 * groups, generator=generator)
    scores = torch.randint(0, 4, weight.shape, generator=generator).float()  # with ties
    plain, pattern = keep_largest(scores, 0.4), keep_n_of_m(scores, (2, 4))
    codes = torch.randint(0, 2**11, (rows * groups,), generator=generator)
    packed = pack_keep(plain), pack_keep(pattern, (2, 4)), pack(codes, 11)

    def exact():
        yield from (keep_largest(scores, 0.4), keep_largest(scores.view(1, -1), 0.4), keep_n_of_m(scores, (3, 4)))
        yield from (keep_structured(scores, 0.4, 0), keep_structured(scores, 0.4, 1))
        yield from (wanda_scores(weight, second_moment), kept_values(weight, plain))
        yield from (pack_keep(plain), pack_keep(pattern, (2, 4)), pack(codes, 11))
        yield from (unpack_keep(packed[0], (rows, 4 * groups)), unpack_keep(packed[1], (rows, 4 * groups), (2, 4)))
        yield unpack(packed[2], 11, len(codes))
        yield from normalize(weight)
        yield from norms(weight)

    for actual, expected in zip(with_chunks(size, lambda: [*exact()]), exact(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6 if actual.is_floating_point() else 0, atol=0)
    other = weight * plain
    loss = with_chunks(size, lambda: reconstruction_loss(weight, other, second_moment))
    dense, in_scale, out_scale = normalize(weight)
    assert loss == pytest.approx(normalized_loss(dense, other / in_scale / out_scale[:, None], second_moment))


@pytest.mark.parametrize("size", [3, 100])
@given(data=st.data())
def test_kth_smallest_is_that_of_sorting(size, data):
    numbers = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140]))
    values = data.draw(st.lists(numbers, min_size=1, max_size=20))
    k = data.draw(st.integers(1, len(values)))
    assert with_chunks(size, lambda: kth_smallest(torch.tensor(values), k).item()) == sorted(values)[k - 1]
