from functools import partial
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nowag_pl.compressors import NoWagPruner, NoWagQuantizer
from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.objective import normalized_loss
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.quantized import subvectors


def make_linear(out_features, in_features, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out_features, in_features, generator=generator))
        linear.weight *= torch.rand(in_features, generator=generator) * 3 + 0.1
        linear.weight *= torch.rand(out_features, 1, generator=generator) * 3 + 0.1
    return linear, torch.rand(in_features, generator=generator).square() + 0.01


def scalar_scores(weight, second_moment):
    """Score as Algorithm 1 of the paper says: columns to unit norm, then rows, then h_j W_bar_ij^2."""
    rows, columns = range(len(weight)), range(len(weight[0]))
    r1 = [sqrt(sum(weight[i][j] ** 2 for i in rows)) or 1.0 for j in columns]
    scaled = [[weight[i][j] / r1[j] for j in columns] for i in rows]
    r2 = [sqrt(sum(scaled[i][j] ** 2 for j in columns)) or 1.0 for i in rows]
    return [[second_moment[j] * (scaled[i][j] / r2[i]) ** 2 for j in columns] for i in rows]


def scalar_keep(scores, num_kept):
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return [j in order[:num_kept] for j in range(len(scores))]


@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 9),
    sparsity=st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9]),
    seed=st.integers(0, 99),
)
def test_unstructured_mask_equals_scalar_loops(rows, columns, sparsity, seed):
    linear, second_moment = make_linear(rows, columns, seed)
    scores = scalar_scores(linear.weight.tolist(), second_moment.tolist())
    flat = [score for row in scores for score in row]
    expected = scalar_keep(flat, len(flat) - round(sparsity * len(flat)))
    compressed = NoWagPruner(sparsity=sparsity).compress(linear, second_moment)
    assert compressed.keep.flatten().tolist() == expected
    assert torch.equal(compressed.weight[compressed.keep], linear.weight[compressed.keep])


@pytest.mark.parametrize("pattern", [(1, 4), (3, 4), (2, 4), (4, 8), (3, 16)])
def test_pattern_mask_equals_scalar_loops(pattern):
    linear, second_moment = make_linear(5, 16)
    num_kept, size = pattern
    expected = [
        [kept for start in range(0, 16, size) for kept in scalar_keep(row[start : start + size], num_kept)]
        for row in scalar_scores(linear.weight.tolist(), second_moment.tolist())
    ]
    compressed = NoWagPruner(pattern=pattern).compress(linear, second_moment)
    assert compressed.keep.tolist() == expected
    assert compressed.pattern == pattern
    assert compressed.sparsity == pytest.approx(1 - num_kept / size)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_structured_masks_equal_scalar_loops(sparsity):
    linear, second_moment = make_linear(5, 7)
    scores = scalar_scores(linear.weight.tolist(), second_moment.tolist())
    rows = scalar_keep([sum(row) for row in scores], 5 - round(sparsity * 5))
    columns = scalar_keep([sum(column) for column in zip(*scores, strict=True)], 7 - round(sparsity * 7))
    by_rows = NoWagPruner(sparsity=sparsity, structured="rows").compress(linear, second_moment)
    by_columns = NoWagPruner(sparsity=sparsity, structured="columns").compress(linear, second_moment)
    assert by_rows.keep.tolist() == [[kept] * 7 for kept in rows]
    assert by_columns.keep.tolist() == [columns] * 5


def test_equal_scores_are_settled_in_row_major_order():
    linear, second_moment = make_linear(4, 4)
    nn.init.ones_(linear.weight)
    compressed = NoWagPruner(sparsity=0.6).compress(linear, torch.ones_like(second_moment))
    assert compressed.keep.flatten().tolist() == [True] * 6 + [False] * 10


@pytest.mark.parametrize("structured", ["diagonals", "row", ""])
def test_unknown_structure_is_refused(structured):
    with pytest.raises(ValueError, match=f"'rows', 'columns' or null, but got '{structured}'"):
        NoWagPruner(structured=structured)


def test_structure_with_a_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern or structured, but got \(2, 4\) and 'rows'"):
        NoWagPruner(pattern=(2, 4), structured="rows")


def test_pattern_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="divisible by 4 for the pattern 1:4, but got 6"):
        NoWagPruner(pattern=(1, 4)).compress(*make_linear(4, 6))


def quantized_loss(linear, second_moment, quantizer):
    compressed = quantizer.compress(linear, second_moment)
    return normalized_loss(
        normalize(linear.weight.detach()).weight, compressed.normalized_weight.detach(), second_moment
    )


@pytest.mark.parametrize(("in_features", "dim"), [(12, 4), (13, 4), (12, 6), (7, 3)])
def test_quantizer_beats_nothing_kept(in_features, dim):
    linear, second_moment = make_linear(16, in_features)
    loss = quantized_loss(linear, second_moment, NoWagQuantizer(dim, codebook_size=16))
    assert 0 < loss < 0.7
    more = quantized_loss(linear, second_moment, NoWagQuantizer(dim, codebook_size=32))
    assert more < loss


@pytest.mark.parametrize("weighting", ["output", "normalized"])
def test_codes_are_the_nearest_codewords_in_the_weighted_norm(weighting):
    linear, second_moment = make_linear(6, 7)
    compressed = NoWagQuantizer(3, 5, weighting=weighting).compress(linear, second_moment)
    normalized, in_scale, out_scale = normalize(linear.weight.detach())
    if weighting == "normalized":
        in_scale, out_scale = torch.ones(7), torch.ones(6)
    for i in range(6):
        for group in range(3):
            columns = range(3 * group, min(3 * group + 3, 7))
            distances = [
                sum(
                    float(second_moment[j])
                    * (float(out_scale[i] * in_scale[j]) * (float(normalized[i, j]) - codeword[j % 3])) ** 2
                    for j in columns
                )
                for codeword in compressed.codebook.tolist()
            ]
            chosen = distances[compressed.unpacked_codes[i, group]]
            assert chosen <= min(distances) + 1e-4  # the codebook is rounded after the codes are chosen


@pytest.mark.parametrize("weighting", ["output", "normalized"])
def test_quantizer_works_on_the_subvectors_of_the_padded_normalized_weight(weighting):
    linear, second_moment = make_linear(9, 7)
    compressed = NoWagQuantizer(3, 5, weighting=weighting, seed=4).compress(linear, second_moment)
    normalized, in_scale, out_scale = normalize(linear.weight.detach())
    weights = second_moment.expand(9, -1)
    if weighting == "output":
        weights = second_moment * (in_scale * out_scale[:, None]).square()
        weights = weights / weights.mean()
    generator = torch.Generator().manual_seed(4)
    fit = weighted_kmeans(
        subvectors(normalized, 3), subvectors(weights, 3), KMeansSettings(5, tolerance=5e-4), generator
    )
    assert torch.equal(compressed.unpacked_codes.flatten(), fit.codes)
    torch.testing.assert_close(compressed.codebook.detach(), fit.codebook.half().float(), rtol=2e-3, atol=1e-5)


def test_a_codeword_for_every_subvector_restores_the_weight():
    linear, second_moment = make_linear(4, 6)
    compressed = NoWagQuantizer(subvector_dim=3, codebook_size=8).compress(linear, second_moment)
    torch.testing.assert_close(compressed.weight, linear.weight.detach(), rtol=5e-3, atol=5e-3)
    assert compressed.weight.shape == (4, 6)


def test_same_seed_gives_the_same_bytes():
    linear, second_moment = make_linear(16, 14)
    first, same, other = (
        NoWagQuantizer(4, 8, seed=seed, max_iters=3).compress(linear, second_moment).storage() for seed in (5, 5, 6)
    )
    as_bytes = [{name: tensor.numpy().tobytes() for name, tensor in s.items()} for s in (first, same, other)]
    assert as_bytes[0] == as_bytes[1]
    assert as_bytes[0]["codebook"] != as_bytes[2]["codebook"]


def test_max_iters_and_tolerance_reach_the_fit():
    linear, second_moment = make_linear(24, 12)
    quantizer = partial(NoWagQuantizer, 3, 8, weighting="normalized")
    start = quantized_loss(linear, second_moment, quantizer(max_iters=0))
    rough = quantized_loss(linear, second_moment, quantizer(tolerance=0.5))
    fine = quantized_loss(linear, second_moment, quantizer(tolerance=0.0))
    assert fine < rough < start


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="Expected weighting to be 'output' or 'normalized', but got 'rows'"):
        NoWagQuantizer(weighting="rows")


def test_more_codewords_than_subvectors_are_refused():
    with pytest.raises(ValueError, match="9 codewords for 8 subvectors"):
        NoWagQuantizer(subvector_dim=4, codebook_size=9).compress(*make_linear(4, 7))


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("subvector_dim", 0, 1), ("codebook_size", 0, 1), ("max_iters", -1, 0), ("tolerance", -0.1, 0)],
)
def test_numbers_out_of_range_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"Expected {name} of at least {least}, but got {value}"):
        NoWagQuantizer(**{name: value})
