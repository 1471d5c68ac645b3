import pytest
import torch
from test_nowag import make_linear

from nowag_pl.compressors import ArmorCompressor, NoWagPruner
from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.objective import normalized_loss


def loss(linear, compressed, second_moment):
    """Return the paper's objective of a compressed linear over its value at zero."""
    normalized = normalize(linear.weight)
    reconstruction = compressed.weight.float() / normalized.in_scale / normalized.out_scale[:, None]
    return normalized_loss(normalized.weight, reconstruction, second_moment)


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_start_is_what_nowag_p_gives(pattern):
    linear, second_moment = make_linear(12, 32, bias=True)
    start = ArmorCompressor(pattern, block_size=8, max_iters=0).compress(linear, second_moment)
    pruned = NoWagPruner(pattern=pattern).compress(linear, second_moment)
    assert torch.equal(start.keep, pruned.keep)
    torch.testing.assert_close(start.weight, pruned.weight, rtol=2e-3, atol=1e-6)
    assert torch.equal(start.bias, linear.bias)


@pytest.mark.parametrize(("pattern", "selection"), [((1, 4), "gradient"), ((4, 8), "gradient"), ((2, 4), "random")])
def test_loss_falls_by_a_third_from_nowag_p(pattern, selection):
    linear, second_moment = make_linear(24, 32)
    before = linear.weight.detach().clone()
    fitted = ArmorCompressor(pattern, block_size=8, max_iters=100, selection=selection)
    compressed = fitted.compress(linear, second_moment)
    pruned = NoWagPruner(pattern=pattern).compress(linear, second_moment)
    assert loss(linear, compressed, second_moment) < 0.67 * loss(linear, pruned, second_moment)
    assert torch.equal(linear.weight, before)


def test_scales_are_folded_into_the_factors():
    linear, second_moment = make_linear(8, 16)
    normalized = normalize(linear.weight)
    compressed = ArmorCompressor(block_size=8, max_iters=0).compress(linear, second_moment)
    assert torch.equal(torch.block_diag(*compressed.out_factor), normalized.out_scale.half().float().diag())
    assert torch.equal(torch.block_diag(*compressed.in_factor), normalized.in_scale.half().float().diag())
    assert torch.equal(compressed.values, normalized.weight[compressed.keep].half().float())


@pytest.mark.parametrize(
    ("rows", "columns", "out_block", "in_block"), [(17, 52, 1, 4), (26, 24, 13, 12), (10, 36, 10, 12), (7, 16, 7, 16)]
)
def test_sizes_that_the_block_size_does_not_divide_take_smaller_blocks(rows, columns, out_block, in_block):
    linear, second_moment = make_linear(rows, columns)
    compressed = ArmorCompressor(block_size=16, max_iters=20).compress(linear, second_moment)
    assert compressed.settings()["out_block"] == out_block
    assert compressed.settings()["in_block"] == in_block
    assert compressed.bits_per_weight == pytest.approx(8.75 + 16 * (out_block / columns + in_block / rows))
    pruned = NoWagPruner(pattern=(2, 4)).compress(linear, second_moment)
    assert loss(linear, compressed, second_moment) < loss(linear, pruned, second_moment)


def test_output_weighting_lowers_the_error_of_the_output():
    linear, second_moment = make_linear(24, 32)

    def output_error(weighting):
        compressor = ArmorCompressor(block_size=8, max_iters=100, weighting=weighting)
        error = compressor.compress(linear, second_moment).weight - linear.weight
        return float((error.detach().square() * second_moment).sum())

    assert output_error("output") < 0.95 * output_error("normalized")


def test_both_factors_have_sizes_of_their_own():
    linear, second_moment = make_linear(32, 24)
    compressed = ArmorCompressor(block_size=[16, 8], max_iters=1).compress(linear, second_moment)
    assert compressed.out_factor.shape == (2, 16, 16)
    assert compressed.in_factor.shape == (3, 8, 8)


@pytest.mark.parametrize("factor", [0.0, 1e-12, 1e6])
def test_size_of_the_second_moments_does_not_matter(factor):
    linear, second_moment = make_linear(8, 16)
    compressor = ArmorCompressor(block_size=8, max_iters=10)
    compressed = compressor.compress(linear, factor * second_moment)
    assert compressed.weight.isfinite().all()
    if factor:
        expected = compressor.compress(linear, second_moment)
        torch.testing.assert_close(compressed.weight, expected.weight, rtol=1e-2, atol=1e-2)


def test_dead_channels_and_rows_stay_finite():
    linear, second_moment = make_linear(8, 16)
    second_moment[[0, 1, 2, 9]] = 0
    linear.weight.data[3] = 0
    linear.weight.data[:, 5] = 0
    compressed = ArmorCompressor(block_size=8, max_iters=60).compress(linear, second_moment)
    pruned = NoWagPruner(pattern=(2, 4)).compress(linear, second_moment)
    assert compressed.weight.isfinite().all()
    assert loss(linear, compressed, second_moment) < loss(linear, pruned, second_moment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_has_the_type_of_the_linear(dtype):
    linear, second_moment = make_linear(8, 16, bias=True)
    compressed = ArmorCompressor(block_size=8, max_iters=5).compress(linear.to(dtype), second_moment)
    assert compressed.weight.dtype == compressed.bias.dtype == dtype


def test_seed_decides_all():
    linear, second_moment = make_linear(24, 32)

    def values(seed):
        return ArmorCompressor(block_size=8, max_iters=20, seed=seed).compress(linear, second_moment).values

    assert torch.equal(values(3), values(3))
    assert not torch.equal(values(3), values(4))


@pytest.mark.parametrize("pattern", [(2, 4), (3, 8)])
def test_rows_that_the_pattern_does_not_divide_are_refused(pattern):
    with pytest.raises(ValueError, match=rf"input features divisible by {pattern[1]} .*, but got 30"):
        ArmorCompressor(pattern).compress(*make_linear(4, 30))


def test_shape_of_the_second_moment_is_checked():
    linear, _ = make_linear(4, 8)
    with pytest.raises(ValueError, match="each of 8 input features"):
        ArmorCompressor().compress(linear, torch.ones(7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": (5, 4)}, r"but got \(5, 4\)"),
        ({"pattern": (8, 16)}, "at most 256 ways"),
        ({"block_size": 3}, "block_size of at least 4, but got 3"),
        ({"block_size": 2.5}, "block_size of at least 4, but got 2.5|block_size to be .*, but got 2.5"),
        ({"block_size": (8, 8, 8)}, "number of sizes in block_size"),
        ({"max_iters": -1}, "max_iters of at least 0, but got -1"),
        ({"learning_rate": -0.1}, "learning_rate of at least 0, but got -0.1"),
        ({"tolerance": -0.1}, "tolerance of at least 0, but got -0.1"),
        ({"selection": "best"}, "selection to be one of .*'random'.*, but got 'best'"),
        ({"weighting": "none"}, "weighting to be one of .*'output'.*, but got 'none'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ArmorCompressor(**settings)


def test_pattern_of_a_file_is_a_list():
    assert ArmorCompressor(pattern=[2, 4]) == ArmorCompressor()
