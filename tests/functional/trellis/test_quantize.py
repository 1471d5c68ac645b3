from dataclasses import replace

import pytest
import torch

from nowag_pl.functional.feedback import Side
from nowag_pl.functional.moments import damped_inverse_factor, output_error, two_sided_error
from nowag_pl.functional.scale_fits import fit_in_scale, fit_out_scale
from nowag_pl.functional.trellis import quantize
from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.quantize import TrellisSettings, decode_tiles, quantize_trellis, reconstruct

SETTINGS = TrellisSettings(bits=2, state_bits=8)


def problem(num_out=48, num_in=80, seed=0):
    """A weight with unequal rows and columns, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_out, num_in, generator=generator) * torch.rand(num_out, 1, generator=generator)
    mixing = torch.randn(num_in, num_in, generator=generator) * torch.rand(num_in, generator=generator)
    inputs = torch.randn(300, num_in, generator=generator) @ mixing
    return weight, inputs.T @ inputs / 300


def relative_error(settings, weight, moment, seed=0):
    found = quantize_trellis(weight, moment, settings, torch.Generator().manual_seed(seed))
    values = code_values(settings.code, settings.state_bits)
    restored = reconstruct(found, values, settings.bits, settings.rotation)
    errors = output_error(weight, restored, moment).sum() / output_error(weight, 0 * weight, moment).sum()
    return errors.item(), found


@pytest.mark.parametrize("rotation", ["full", "both", "none"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("shape", [(48, 80), (17, 35)])
def test_bits_buy_precision(rotation, feedback, shape):
    weight, moment = problem(*shape)
    settings = replace(SETTINGS, rotation=rotation, feedback=feedback)
    errors = []
    for bits in (1, 2, 4):
        error, found = relative_error(replace(settings, bits=bits), weight, moment)
        assert found.packed.shape == (-(-shape[1] // 16), -(-shape[0] // 16), 16 * bits)
        errors.append(error)
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.3 * errors[1]


@pytest.mark.parametrize("rotation", ["full", "both", "none"])
def test_feedback_and_fits_lower_the_error(rotation):
    weight, moment = problem()
    plain = replace(SETTINGS, rotation=rotation, feedback=False, refit_rounds=0)
    errors = [
        relative_error(each, weight, moment)[0]
        for each in (plain, replace(plain, feedback=True), replace(plain, feedback=True, refit_rounds=2))
    ]
    assert errors[0] > 1.2 * errors[1]
    assert errors[1] > errors[2]


def test_full_rotation_helps_where_blocks_are_unequal():
    """Heads of unequal importance are blocks: what is rounded then costs the same everywhere."""
    weight, moment = problem(64, 96)
    importance = torch.tensor([0.03, 0.3, 3.0]).repeat_interleave(32)
    moment = moment * importance * importance[:, None]
    errors = {kind: relative_error(replace(SETTINGS, rotation=kind), weight, moment)[0] for kind in ("full", "both")}
    assert errors["full"] < 0.9 * errors["both"]


def test_padding_for_the_format_costs_no_precision():
    weight, moment = problem(100, 150)
    error, _ = relative_error(SETTINGS, weight, moment)
    padded, found = relative_error(replace(SETTINGS, multiple=128), weight, moment)
    assert found.packed.shape == (16, 8, 32)
    assert (len(found.in_scale), len(found.out_scale)) == (256, 128)
    assert padded < 1.15 * error


def test_diagonal_moments_are_those_of_uncorrelated_inputs():
    weight, moment = problem()
    diagonal = moment.diagonal()
    found = [
        quantize_trellis(weight, each, SETTINGS, torch.Generator().manual_seed(0))
        for each in (diagonal, diagonal.diag())
    ]
    assert torch.equal(found[0].packed, found[1].packed)


def test_importance_weights_the_search_of_the_paper():
    """Columns that count a hundred times as much get the smaller errors."""
    weight, _ = problem(64, 64)
    moment = torch.where(torch.arange(64) % 2 == 0, 100.0, 1.0)
    settings = replace(SETTINGS, rotation="none", feedback=False, refit_rounds=0)
    found = quantize_trellis(weight, moment, settings, torch.Generator())
    errors = (weight - reconstruct(found, code_values("mul1", 8), 2, "none")).square().sum(dim=0)
    assert 4 * errors[::2].sum() < errors[1::2].sum()


def test_signs_follow_the_generator_and_arguments_stay():
    weight, moment = problem()
    copies = weight.clone(), moment.clone()
    found = [relative_error(SETTINGS, weight, moment, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(found[0].packed, found[1].packed)
    assert not torch.equal(found[0].in_scale.sign(), found[2].in_scale.sign())
    assert torch.equal(weight, copies[0])
    assert torch.equal(moment, copies[1])


def test_table_is_used_and_tiles_train_it():
    weight, moment = problem(32, 32)
    table = torch.linspace(0.01, 2.5, 64)
    settings = replace(SETTINGS, code="table", state_bits=12)
    found = quantize_trellis(weight, moment, settings, torch.Generator().manual_seed(0), table)
    values = code_values("table", 12, table.requires_grad_())
    decode_tiles(found.packed, values, 2).sum().backward()
    assert torch.equal(decode_tiles(found.packed, values.detach(), 2), decode_tiles(found.packed, values, 2))
    assert table.grad.abs().sum() > 0


def test_weights_of_zeros_stay_zero():
    weight, moment = problem(32, 32)
    weight[:, 5] = 0
    for settings in (SETTINGS, replace(SETTINGS, rotation="none")):
        for matrix in (weight, torch.zeros_like(weight)):
            found = quantize_trellis(matrix, moment, settings, torch.Generator().manual_seed(0))
            assert found.in_scale.isfinite().all()
            assert found.out_scale.isfinite().all()


def test_fitted_scales_are_least_squares():
    """Neither vector can be moved for the better: the gradients vanish."""
    weight, moment = problem(12, 10)
    moment, direction = moment.double(), (weight + torch.randn_like(weight) / 2).double()
    in_scale, out_scale = torch.ones(10), torch.ones(12)
    for _ in range(200):
        in_scale = fit_in_scale(weight, direction.float(), in_scale, out_scale, moment.float())
        out_scale = fit_out_scale(weight, direction.float(), in_scale, out_scale, moment.float())
    scales = in_scale.double().requires_grad_(), out_scale.double().requires_grad_()
    error = output_error(weight, (direction * scales[0] * scales[1][:, None]).float(), moment.float())
    total = error.sum()
    total.backward()
    assert (scales[0].grad.abs() * in_scale).max() < 1e-2 * total.item()
    assert (scales[1].grad.abs() * out_scale).max() < 1e-3 * total.item()


@pytest.mark.parametrize("rotation", ["both", "none"])
@pytest.mark.parametrize("shape", [(48, 80), (40, 70)])
def test_coupled_outputs_lose_less_with_feedback_along_both_sides(rotation, shape):
    weight, moment = problem(*shape)
    coupling = problem(1, shape[0], seed=1)[1]
    settings = replace(SETTINGS, rotation=rotation)
    values = code_values(settings.code, settings.state_bits)
    errors = []
    for output_moment in (None, coupling):
        generator = torch.Generator().manual_seed(0)
        found = quantize_trellis(weight, moment, settings, generator, output_moment=output_moment)
        restored = reconstruct(found, values, settings.bits, settings.rotation)
        errors.append(two_sided_error(weight, restored, moment, coupling))
    assert errors[1] < 0.9 * errors[0]


def test_uncoupled_outputs_need_one_side_only():
    target, moment = problem(48, 80)
    values = code_values(SETTINGS.code, SETTINGS.state_bits)
    settings = replace(SETTINGS, rotation="none")
    one = quantize._search(target, moment, torch.ones(80), values, settings)
    sides = Side.of(torch.eye(48), 16), Side.of(damped_inverse_factor(moment, settings.damping)[1], 16)
    assert torch.equal(one, quantize._search_two_sided(target, *sides, values, settings))


def test_scales_fit_coupled_outputs_best():
    weight, moment = problem(12, 20)
    coupling = problem(1, 12, seed=1)[1]
    direction, ones = weight.sign(), (torch.ones(20), torch.ones(12))
    generator = torch.Generator().manual_seed(2)

    def error(in_scale, out_scale):
        return two_sided_error(weight, direction * in_scale * out_scale[:, None], moment, coupling)

    out_scale = fit_out_scale(weight, direction, *ones, moment, coupling)
    in_scale = fit_in_scale(weight, direction, *ones, moment, coupling)
    for _ in range(10):
        assert error(ones[0], out_scale) <= error(ones[0], out_scale + 0.05 * torch.randn(12, generator=generator))
        assert error(in_scale, ones[1]) <= error(in_scale + 0.05 * torch.randn(20, generator=generator), ones[1])
