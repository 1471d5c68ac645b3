import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_problems import problem, total

from nowag_pl.functional.least_squares import refit_kept
from nowag_pl.functional.moments import output_error
from nowag_pl.functional.vq.refit import refit_codebook, refit_in_scale, refit_out_scale


def masked(out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(60, in_features, generator=generator)
    tokens = tokens @ (torch.eye(in_features) + 0.4 * torch.randn(in_features, in_features, generator=generator))
    weight = torch.randn(out_features, in_features, generator=generator)
    return weight, torch.rand(out_features, in_features, generator=generator) < 0.5, tokens


def test_kept_weights_are_the_least_squares_of_each_row():
    weight, keep, tokens = masked(5, 8, seed=0)
    keep[3] = False  # nothing is left of this row
    keep[4] = True
    refitted = refit_kept(weight, keep, tokens.T @ tokens / len(tokens), num_steps=30)
    for row, mask, actual in zip(weight, keep, refitted, strict=True):
        assert torch.equal(actual[~mask], torch.zeros(int((~mask).sum())))
        if mask.any():
            expected = torch.linalg.lstsq(tokens[:, mask].double(), (tokens @ row).double()).solution.float()
            torch.testing.assert_close(actual[mask], expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), num_steps=st.integers(0, 12))
def test_no_row_gets_worse_after_any_number_of_steps(seed, num_steps):
    weight, keep, tokens = masked(6, 9, seed)
    matrix = tokens.T @ tokens / len(tokens)
    before = output_error(weight, torch.where(keep, weight, 0), matrix)
    after = output_error(weight, refit_kept(weight, keep, matrix, num_steps), matrix)
    assert (after <= before * (1 + 1e-4) + 1e-5).all()


def test_dead_channels_keep_their_weights():
    weight, keep, tokens = masked(4, 6, seed=1)
    tokens[:, 2] = 0
    keep[:, 2] = True
    refitted = refit_kept(weight, keep, tokens.T @ tokens / len(tokens), num_steps=20)
    assert torch.equal(refitted[:, 2], weight[:, 2])


def test_out_scale_is_the_minimum_of_each_row():
    weight, matrix, quantized = problem(5, 7, 3)
    fitted = quantized._replace(out_scale=refit_out_scale(weight, quantized, matrix))
    errors = output_error(weight, fitted.weight, matrix)
    for factor in (0.98, 1.02):
        moved = fitted._replace(out_scale=fitted.out_scale * factor)
        assert (errors < output_error(weight, moved.weight, matrix)).all()


def test_in_scale_is_near_the_minimum():
    weight, matrix, quantized = problem(8, 6, 2, 4)
    fitted = quantized._replace(in_scale=refit_in_scale(weight, quantized, matrix))
    scale = quantized.in_scale.double().requires_grad_()
    codewords = quantized.codebook.double()[quantized.codes].flatten(1)[:, :6] * quantized.out_scale.double()[:, None]
    root = torch.linalg.cholesky(matrix.double())  # |(w - q) root|^2 is the error
    columns = [(codewords[:, j, None] * root[j]).flatten() for j in range(6)]
    target = (weight.double() @ root).flatten()
    best = torch.linalg.lstsq(torch.stack(columns, dim=1), target).solution
    exact = total(weight, quantized._replace(in_scale=best.float()), matrix)
    assert exact <= total(weight, fitted, matrix) * (1 + 1e-5)
    assert total(weight, fitted, matrix) < exact + 0.02 * (total(weight, quantized, matrix) - exact)
    assert scale.grad is None


def test_codebook_comes_to_the_least_squares():
    weight, matrix, quantized = problem(9, 7, 3, 3)
    for _ in range(8):
        quantized = quantized._replace(codebook=refit_codebook(weight, quantized, matrix))
    root = torch.linalg.cholesky(matrix.double())
    columns = []
    for k in range(3):
        for j in range(3):
            unit = torch.zeros(3, 3)
            unit[k, j] = 1
            columns.append((quantized._replace(codebook=unit).weight.double() @ root).flatten())
    best = torch.linalg.lstsq(torch.stack(columns, dim=1), (weight.double() @ root).flatten()).solution
    torch.testing.assert_close(quantized.codebook, best.view(3, 3).float(), rtol=1e-2, atol=1e-3)


def test_unused_codewords_stay():
    weight, matrix, quantized = problem(4, 6, 2, 3)
    quantized = quantized._replace(codes=quantized.codes.clamp(max=1))
    codebook = refit_codebook(weight, quantized, matrix)
    assert torch.equal(codebook[2], quantized.codebook[2])
    assert not torch.equal(codebook[:2], quantized.codebook[:2])


@pytest.mark.parametrize("fit", [refit_out_scale, refit_in_scale, refit_codebook])
@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_no_fit_raises_the_error(fit, seed):
    weight, matrix, quantized = problem(6, 7, 3, 4, seed)
    name = {refit_out_scale: "out_scale", refit_in_scale: "in_scale", refit_codebook: "codebook"}[fit]
    fitted = quantized._replace(**{name: fit(weight, quantized, matrix)})
    assert total(weight, fitted, matrix) <= total(weight, quantized, matrix) * (1 + 1e-5)
