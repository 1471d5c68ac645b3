from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.predictions.divergence import kl_divergence, negative_log_likelihood


def scalar_log_softmax(logits):
    largest = max(logits)
    total = log(sum(exp(value - largest) for value in logits))
    return [value - largest - total for value in logits]


def scalar_kl(reference, logits):
    total = 0.0
    for reference_row, row in zip(reference, logits, strict=True):
        log_p, log_q = scalar_log_softmax(reference_row), scalar_log_softmax(row)
        total += sum(exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
    return total


def random_logits(tokens, vocabulary, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(tokens, vocabulary, generator=generator)).to(dtype) for _ in range(2)]


@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_likelihood_equals_scalar_loops(tokens, vocabulary, seed, dtype):
    logits, _ = random_logits(tokens, vocabulary, seed, dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    expected = -sum(
        scalar_log_softmax(row)[target] for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
    )
    actual = negative_log_likelihood(logits, targets)
    assert actual.dtype == torch.float64
    assert actual.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, before)


@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_divergence_equals_scalar_loops(tokens, vocabulary, seed, dtype):
    reference, logits = random_logits(tokens, vocabulary, seed, dtype)
    before = reference.clone(), logits.clone()
    divergence, agreements = kl_divergence(reference, logits)
    assert divergence.dtype == torch.float64
    expected = scalar_kl(reference.tolist(), logits.tolist())
    assert divergence.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    pairs = zip(reference.tolist(), logits.tolist(), strict=True)
    assert agreements.item() == sum(row.index(max(row)) == other.index(max(other)) for row, other in pairs)
    assert torch.equal(reference, before[0])
    assert torch.equal(logits, before[1])


def test_reference_comes_first():
    sure, unsure = torch.tensor([[3.0, 0.0, 0.0]]), torch.zeros(1, 3)
    forward, backward = kl_divergence(sure, unsure)[0], kl_divergence(unsure, sure)[0]
    assert forward.item() == pytest.approx(scalar_kl(sure.tolist(), unsure.tolist()), rel=1e-5)
    assert backward.item() != pytest.approx(forward.item(), rel=0.01)


def test_equal_predictions_do_not_diverge():
    logits, _ = random_logits(5, 11, seed=0)
    divergence, agreements = kl_divergence(logits, logits + 7)  # a shift of all logits says the same
    assert divergence.item() == pytest.approx(0, abs=1e-5)
    assert agreements.item() == 5


@pytest.mark.parametrize("tile", [(1, 1), (3, 2), (7, 4), (100, 100)])
def test_tiles_of_positions_and_words_change_nothing(tile):
    reference, logits = random_logits(7, 5, seed=1)
    targets = torch.arange(7) % 5
    expected, expected_agreements = kl_divergence(reference, logits)
    divergence, agreements = kl_divergence(reference, logits, tile)
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-6)
    assert agreements == expected_agreements
    assert negative_log_likelihood(logits, targets, tile).item() == pytest.approx(
        negative_log_likelihood(logits, targets).item(), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_huge_logits_stay_finite(dtype):
    logits = torch.tensor([[6e4, -6e4, 0.0]], dtype=dtype)
    assert negative_log_likelihood(logits, torch.tensor([1])).item() == pytest.approx(1.2e5, rel=0.01)
    assert kl_divergence(logits, logits.flip(1))[0].item() == pytest.approx(6e4, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_of_any_integer_type(dtype):
    targets = torch.tensor([1, 0], dtype=dtype)
    assert negative_log_likelihood(torch.zeros(2, 4), targets).item() == pytest.approx(2 * log(4))
