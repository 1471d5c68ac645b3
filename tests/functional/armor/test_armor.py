from itertools import accumulate

import pytest
import torch
from armor_problems import random_problem, scalar_loss
from hypothesis import given, settings
from hypothesis import strategies as st

from nowag_pl.functional.armor.fit import CHECKS, ArmorSettings, fit_armor
from nowag_pl.functional.armor.groups import choose_groups, improve_groups, supports_of
from nowag_pl.functional.armor.objective import gradients_of, identity_factors, reconstruct


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def start_of(target, pattern=(2, 4), out_block=3, in_block=8):
    from nowag_pl.functional.pruning import keep_n_of_m, nowag_scores

    keep = keep_n_of_m(nowag_scores(target.weight, target.column_weights), pattern)
    return identity_factors(target.weight, keep, out_block, in_block)


@given(
    learning_rate=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 100.0]),
    pattern=st.sampled_from([(1, 4), (2, 4), (3, 4)]),
    selection=st.sampled_from(["gradient", "random"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_result_is_the_best_on_the_way(learning_rate, pattern, selection, seed):
    target, _ = random_problem(seed=seed)
    start = start_of(target, pattern)
    before = [tensor.clone() for tensor in start]
    fit = fit_armor(target, start, ArmorSettings(pattern, 12, learning_rate, selection=selection), seeded(seed))
    assert fit.losses[0] == pytest.approx(scalar_loss(target, target.weight * start.keep), rel=1e-5)
    assert min(fit.losses) == pytest.approx(scalar_loss(target, reconstruct(fit.factors)), rel=1e-3)
    assert (fit.factors.keep.view(-1, 4).sum(dim=1) == pattern[0]).all()
    assert (fit.factors.core[~fit.factors.keep] == 0).all()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(start, before, strict=True))


def test_first_iteration_is_a_step_of_adam_and_a_discrete_step():
    """Adam's first step moves each value by its rate against the gradient's sign; S by the ratio of the scales."""
    target, _ = random_problem()
    start, rate = start_of(target), 1e-3
    gradients = gradients_of(target, start, target.weight - reconstruct(start))
    core_rate = rate * float(start.core.square().mean().sqrt() / start.out_factor.square().mean().sqrt())
    moved = start._replace(
        out_factor=start.out_factor - rate * gradients.out_factor.sign(),
        core=(start.core - core_rate * gradients.core.sign()) * start.keep,
        in_factor=start.in_factor - rate * gradients.in_factor.sign(),
    )
    groups = choose_groups(start, 4, seeded(), gradients.core)
    residual = target.weight - reconstruct(moved)
    expected, _ = improve_groups(target, moved, residual, groups, supports_of((2, 4)), 4)
    actual = fit_armor(target, start, ArmorSettings((2, 4), 1, rate), seeded()).factors
    for tensor, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


def test_both_steps_help():
    target, _ = random_problem(24, 32, seed=1)
    start = start_of(target)
    both, discrete = (fit_armor(target, start, ArmorSettings((2, 4), 200, rate), seeded()) for rate in (2e-2, 0.0))
    assert both.losses[-1] < 0.5 * both.losses[0]
    assert both.losses[-1] < 0.8 * discrete.losses[-1]
    assert (both.factors.keep != start.keep).any()
    assert discrete.losses[-1] == pytest.approx(discrete.losses[0])  # with A = B = I magnitudes are the best supports


def test_rate_that_is_too_high_recovers():
    target, _ = random_problem(24, 32, seed=1)
    losses = fit_armor(target, start_of(target), ArmorSettings((2, 4), 200, 10.0), seeded()).losses
    assert min(losses) < 0.7 * losses[0]
    assert max(losses) < 3 * losses[0]


@pytest.mark.slow
def test_constant_rate_reaches_lower_in_the_end():
    """Steps that raise the objective are taken: without them, supports stay what they were."""
    target, _ = random_problem(24, 32, seed=1)
    cosine, constant = (
        min(fit_armor(target, start_of(target), ArmorSettings((2, 4), 1000, *rest), seeded()).losses)
        for rest in ((2e-2, 0.0, "gradient", "cosine"), (6e-3, 0.0, "gradient", "constant"))
    )
    assert constant < cosine


@pytest.mark.parametrize(("tolerance", "num_iters"), [(0.0, 400), (0.999, 400 // CHECKS)])
def test_small_gain_stops(tolerance, num_iters):
    target, _ = random_problem(24, 32)
    fit = fit_armor(target, start_of(target), ArmorSettings((2, 4), 400, 1e-3, tolerance), seeded())
    assert len(fit.losses) == num_iters + 1


def test_gain_is_that_of_the_last_iterations():
    target, _ = random_problem(24, 32)
    losses = fit_armor(target, start_of(target), ArmorSettings((2, 4), 2000, 2e-2, 0.2), seeded()).losses
    least, window = list(accumulate(losses, min)), 2000 // CHECKS
    gains = [1 - least[n] / least[n - window] for n in range(window, len(losses), window)]
    assert gains[-1] <= 0.2
    assert all(gain > 0.2 for gain in gains[:-1])
    assert 1 < len(gains) < CHECKS
    assert len(losses) == len(gains) * window + 1


def test_no_iterations_give_the_start():
    target, _ = random_problem()
    start = start_of(target)
    fit = fit_armor(target, start, ArmorSettings((2, 4), 0, 1e-2), seeded())
    assert len(fit.losses) == 1
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(fit.factors, start, strict=True))


def test_seed_decides_all_and_global_random_state_is_left_alone():
    target, _ = random_problem(24, 32)
    start, state = start_of(target), torch.get_rng_state()
    first, same, other = (fit_armor(target, start, ArmorSettings((2, 4), 20, 1e-2), seeded(seed)) for seed in (3, 3, 4))
    assert first.losses == same.losses
    assert all(torch.equal(one, two) for one, two in zip(first.factors, same.factors, strict=True))
    assert not torch.equal(first.factors.core, other.factors.core)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dead", ["weight", "column_weights"])
def test_nothing_to_approximate_costs_nothing(dead):
    target, _ = random_problem()
    target = target._replace(**{dead: torch.zeros_like(getattr(target, dead))})
    fit = fit_armor(target, start_of(target), ArmorSettings((2, 4), 100, 1e-2), seeded())
    assert fit.losses == [0.0] * (100 // CHECKS + 1)
    assert all(tensor.isfinite().all() for tensor in fit.factors)
