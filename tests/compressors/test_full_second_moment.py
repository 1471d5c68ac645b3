"""The options that need the matrix of x x^T."""

import pytest
import torch
from torch import nn

from nowag_pl import NoWagPruner, NoWagQuantizer, SecondMoment
from nowag_pl.compressors import Compressor, WandaPruner
from nowag_pl.functional.moments import output_error

QUANTIZER = {"subvector_dim": 3, "codebook_size": 8}
PLAIN = {
    "50 %": NoWagPruner(),
    "1:4": NoWagPruner(pattern=(1, 4)),
    "3:4": NoWagPruner(pattern=(3, 4)),
    "rows": NoWagPruner(structured="rows"),
    "columns": NoWagPruner(structured="columns"),
    "vq": NoWagQuantizer(**QUANTIZER),
}
BETTER = {
    **{f"{name}, refit": NoWagPruner(p.sparsity, p.pattern, p.structured, "refit") for name, p in PLAIN.items()
       if isinstance(p, NoWagPruner)},
    **{f"{name}, alternating": NoWagPruner(p.sparsity, p.pattern, p.structured, "alternating")
       for name, p in PLAIN.items() if isinstance(p, NoWagPruner)},
    "vq, scales": NoWagQuantizer(**QUANTIZER, refit_scales=True),
    "vq, feedback": NoWagQuantizer(**QUANTIZER, update="feedback", rounds=2),
    "vq, alternating": NoWagQuantizer(**QUANTIZER, update="alternating", rounds=2, refit_scales=True),
}  # fmt: skip
parametrize = pytest.mark.parametrize("name", BETTER)


def make_linear(bias=True, dtype=torch.float32, out_features=16, in_features=12):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    mixing = torch.eye(in_features) + 0.5 * torch.randn(in_features, in_features, generator=generator)
    moment = SecondMoment(in_features, full=True)
    moment.update(torch.randn(2, 40, in_features, generator=generator) @ mixing)
    return linear, moment.compute()


@parametrize
def test_asks_for_the_matrix_and_refuses_others(name):
    assert isinstance(BETTER[name], Compressor)
    assert BETTER[name].full_second_moment
    assert eval(repr(BETTER[name])) == BETTER[name]
    linear, matrix = make_linear()
    with pytest.raises(ValueError, match=r"full second moments of 12 input features.*SecondMoment\(num_features, full"):
        BETTER[name].compress(linear, matrix.diagonal())
    matrix[2, 3] = float("nan")
    with pytest.raises(ValueError, match="Expected finite second moments, but got 1 NaN"):
        BETTER[name].compress(linear, matrix)


@pytest.mark.parametrize("compressor", [*PLAIN.values(), WandaPruner(), NoWagQuantizer(weighting="output", restarts=2)])
def test_others_do_not_ask_and_take_either(compressor):
    assert not compressor.full_second_moment
    if isinstance(compressor, NoWagQuantizer):
        compressor = NoWagQuantizer(**QUANTIZER)
    linear, matrix = make_linear()
    weights = [compressor.compress(linear, moments).weight for moments in (matrix, matrix.diagonal())]
    assert torch.equal(*weights)


@parametrize
def test_output_is_nearer_than_the_plain_methods_at_the_same_bits(name):
    linear, matrix = make_linear()
    plain = PLAIN[name.split(",")[0]].compress(linear, matrix.diagonal())
    better = BETTER[name].compress(linear, matrix)
    errors = [float(output_error(linear.weight, each.weight, matrix).sum().detach()) for each in (plain, better)]
    assert errors[1] <= errors[0]
    if "rows" not in name:
        assert errors[1] < 0.95 * errors[0]
    assert better.bits_per_weight == plain.bits_per_weight
    assert better.sparsity == plain.sparsity
    assert better.settings() == plain.settings()


@pytest.mark.parametrize("update", ["refit", "alternating"])
@pytest.mark.parametrize("pattern", [(1, 4), (3, 4), (2, 4)])
def test_pattern_is_kept_exactly(pattern, update):
    pruned = NoWagPruner(pattern=pattern, update=update).compress(*make_linear())
    assert (pruned.keep.view(-1, 4).sum(dim=1) == pattern[0]).all()
    assert torch.equal(pruned.weight[~pruned.keep], torch.zeros(int((~pruned.keep).sum())))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("update", ["refit", "alternating"])
def test_sparsity_is_kept_exactly(sparsity, update):
    linear, matrix = make_linear()
    pruned = NoWagPruner(sparsity=sparsity, update=update).compress(linear, matrix)
    assert int((~pruned.keep).sum()) == round(sparsity * pruned.keep.numel())
    if sparsity == 0:
        torch.testing.assert_close(pruned.weight, linear.weight)


def test_refit_keeps_the_mask_of_the_paper_and_alternating_finds_a_better_one():
    linear, matrix = make_linear(out_features=32, in_features=24)
    plain = NoWagPruner(sparsity=0.5).compress(linear, matrix.diagonal())
    refit, free = (NoWagPruner(sparsity=0.5, update=u).compress(linear, matrix) for u in ("refit", "alternating"))
    assert torch.equal(refit.keep, plain.keep)
    assert not torch.equal(free.keep, plain.keep)
    errors = [float(output_error(linear.weight, each.weight, matrix).sum().detach()) for each in (free, refit, plain)]
    assert errors == sorted(errors)


@parametrize
def test_inputs_stay_and_types_are_kept(name):
    linear, matrix = make_linear(dtype=torch.bfloat16)
    before = linear.weight.clone(), linear.bias.clone(), matrix.clone()
    compressed = BETTER[name].compress(linear, matrix)
    assert all(map(torch.equal, before, (linear.weight, linear.bias, matrix)))
    assert compressed.weight.dtype == torch.bfloat16
    assert torch.equal(compressed.bias, linear.bias)


@parametrize
def test_dead_channels_and_zero_weights_give_finite_results(name):
    linear, matrix = make_linear()
    matrix[:4] = matrix[:, :4] = 0
    linear.weight.data[:, 5] = 0
    linear.weight.data[2] = 0
    assert BETTER[name].compress(linear, matrix).weight.isfinite().all()
    assert BETTER[name].compress(linear, torch.zeros(12, 12)).weight.isfinite().all()


def test_restarts_take_the_best_start():
    linear, matrix = make_linear(out_features=40)
    starts = [NoWagQuantizer(**QUANTIZER, seed=seed, restarts=5) for seed in range(4)]
    single = [NoWagQuantizer(**QUANTIZER, seed=seed) for seed in range(4)]

    def loss(quantizer):
        made = quantizer.compress(linear, matrix.diagonal())
        error = (linear.weight.detach() - made.weight).div(made.in_scale).div(made.out_scale[:, None])
        return float((error.square() * matrix.diagonal()).sum().detach())

    assert all(loss(many) <= loss(one) * (1 + 1e-3) for many, one in zip(starts, single, strict=True))
    assert sum(map(loss, starts)) < 0.99 * sum(map(loss, single))


@pytest.mark.parametrize("kind", [NoWagPruner, NoWagQuantizer])
def test_settings_out_of_range_are_refused(kind):
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"Expected damping above 0, but got {damping}"):
            kind(damping=damping)
    with pytest.raises(ValueError, match=r"Expected update to be .* or null, but got 'gptq'"):
        kind(update="gptq")


@pytest.mark.parametrize("name", ["rounds", "restarts"])
def test_counts_under_one_are_refused(name):
    with pytest.raises(ValueError, match=f"Expected {name} of at least 1, but got 0"):
        NoWagQuantizer(**{name: 0})
