from math import sqrt

import pytest
import torch
from torch import nn

from nowag_pl.compressors import MagnitudePruner, WandaPruner


def make_linear(out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = torch.randn(out_features, in_features, generator=generator)
    return linear, torch.rand(in_features, generator=generator).square() + 0.01


def scalar_keep(scores, num_kept):
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return [j in order[:num_kept] for j in range(len(scores))]


def wanda(linear, second_moment):
    moments = second_moment.tolist()
    return [[abs(w) * sqrt(moments[j]) for j, w in enumerate(row)] for row in linear.weight.tolist()]


def scalar_keep_groups(row, num_kept, size):
    return [kept for start in range(0, len(row), size) for kept in scalar_keep(row[start : start + size], num_kept)]


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_magnitude_compares_the_whole_matrix(shape, sparsity):
    linear, second_moment = make_linear(*shape)
    flat = linear.weight.abs().flatten().tolist()
    expected = scalar_keep(flat, len(flat) - round(sparsity * len(flat)))
    compressed = MagnitudePruner(sparsity=sparsity).compress(linear, second_moment)
    assert compressed.keep.flatten().tolist() == expected


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_wanda_compares_within_each_row(shape, sparsity):
    linear, second_moment = make_linear(*shape)
    num_kept = shape[1] - round(sparsity * shape[1])
    expected = [scalar_keep(row, num_kept) for row in wanda(linear, second_moment)]
    assert WandaPruner(sparsity=sparsity).compress(linear, second_moment).keep.tolist() == expected


@pytest.mark.parametrize("pattern", [(1, 4), (3, 4), (4, 8)])
def test_patterns_compare_within_each_group(pattern):
    linear, second_moment = make_linear(4, 16)
    for pruner, scores in [
        (MagnitudePruner, linear.weight.abs().tolist()),
        (WandaPruner, wanda(linear, second_moment)),
    ]:
        expected = [scalar_keep_groups(row, *pattern) for row in scores]
        compressed = pruner(pattern=pattern).compress(linear, second_moment)
        assert compressed.keep.tolist() == expected
        assert compressed.pattern == pattern


@pytest.mark.parametrize("pruner", [MagnitudePruner(), WandaPruner(), WandaPruner(pattern=(2, 4))])
def test_kept_weights_are_the_dense_ones(pruner):
    linear, second_moment = make_linear(4, 8)
    compressed = pruner.compress(linear, second_moment)
    assert torch.equal(compressed.weight[compressed.keep], linear.weight[compressed.keep])
    assert compressed.sparsity == 0.5
