"""Distillation losses against scalar oracles."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.predictions.distillation import distillation_loss, top_distillation_loss, top_log_probabilities


def logits(seed, tokens=5, vocabulary=11, scale=3.0):
    return scale * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(row, temperature):
    weights = [math.exp(value / temperature) for value in row.double().tolist()]
    return [weight / sum(weights) for weight in weights]


def scalar_divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_loss_is_the_scaled_divergence(temperature):
    teacher, student = logits(0), logits(1)
    loss = distillation_loss(teacher, student, temperature)
    expected = [
        temperature**2 * scalar_divergence(probabilities(p, temperature), probabilities(q, temperature))
        for p, q in zip(teacher, student, strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 3, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_loss_lumps_the_others_together(top_k, temperature):
    teacher, student = logits(2), logits(3)
    values, tokens = top_log_probabilities(teacher, top_k, temperature)
    assert (values.dtype, tokens.dtype) == (torch.float32, torch.int32)
    loss = top_distillation_loss(values, tokens, student, temperature)
    expected = []
    for row_p, row_q in zip(teacher, student, strict=True):
        p, q = probabilities(row_p, temperature), probabilities(row_q, temperature)
        first = sorted(range(len(p)), key=lambda token: -p[token])[:top_k]
        top_p, top_q = [p[token] for token in first], [q[token] for token in first]
        expected.append(temperature**2 * scalar_divergence([*top_p, 1 - sum(top_p)], [*top_q, 1 - sum(top_q)]))
    assert loss.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 11), scale=st.sampled_from([0.1, 3.0, 30.0]))
def test_top_loss_lies_between_nothing_and_the_whole(seed, top_k, scale):
    teacher, student = logits(seed, scale=scale), logits(seed + 1, scale=scale)
    loss = top_distillation_loss(*top_log_probabilities(teacher, top_k), student)
    whole = distillation_loss(teacher, student)
    assert bool((loss >= -1e-4).all())
    assert bool((loss <= whole + 1e-4 + 1e-4 * whole).all())
    if top_k == 11:
        torch.testing.assert_close(loss, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_gradients_are_finite_and_vanish_at_the_teacher(top_k):
    for scale in (1.0, 100.0):
        teacher = logits(4, scale=scale)
        student = teacher.clone().requires_grad_(True)
        top_distillation_loss(*top_log_probabilities(teacher, top_k), student).sum().backward()
        torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-4, rtol=0)
        other = logits(5, scale=scale).requires_grad_(True)
        top_distillation_loss(*top_log_probabilities(teacher, top_k), other).sum().backward()
        assert bool(other.grad.isfinite().all())
        assert float(other.grad.abs().sum()) > 0


def test_half_precision_logits_are_compared_in_float32():
    teacher, student = logits(6).bfloat16(), logits(7).bfloat16()
    assert distillation_loss(teacher, student).dtype == torch.float32
    torch.testing.assert_close(
        distillation_loss(teacher, student), distillation_loss(teacher.float(), student.float()), rtol=0, atol=0
    )
