"""Perplexity and divergence against float64 oracles."""

import math

import pytest
import torch

from nowag_pl.lit.metrics import Divergence, Perplexity

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(5, 9, 50, generator=GENERATOR)
REFERENCE = LOGITS + torch.randn(5, 9, 50, generator=GENERATOR)
TOKENS = torch.randint(50, (5, 9), generator=GENERATOR)


def shifted(logits, tokens):
    """Return predictions, and the tokens that came next."""
    return logits[:, :-1], tokens[:, 1:]


def oracle_perplexity(logits, tokens) -> float:
    total, count = 0.0, 0
    for window, ids in zip(logits.double(), tokens, strict=True):
        for place in range(len(ids) - 1):
            total -= float(window[place].log_softmax(0)[ids[place + 1]])
            count += 1
    return math.exp(total / count)


def test_perplexity_is_the_oracles():
    metric = Perplexity()
    metric.update(*shifted(LOGITS, TOKENS))
    assert float(metric.compute()) == pytest.approx(oracle_perplexity(LOGITS, TOKENS), rel=1e-6)


def test_perplexity_does_not_depend_on_batches():
    metric = Perplexity()
    for window, ids in zip(LOGITS.split(2), TOKENS.split(2), strict=True):  # the last one is smaller
        metric.update(*shifted(window, ids))
    assert float(metric.compute()) == pytest.approx(oracle_perplexity(LOGITS, TOKENS), rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary():
    metric = Perplexity()
    metric.update(torch.zeros(2, 7, 50), TOKENS[:2, :7])
    assert float(metric.compute()) == pytest.approx(50)


def test_perplexity_of_half_precision_logits_is_computed_in_single():
    metric = Perplexity()
    metric.update(*shifted(LOGITS.bfloat16(), TOKENS))
    expected = oracle_perplexity(LOGITS.bfloat16(), TOKENS)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-6)


def test_perplexity_survives_certain_mistakes():
    metric, logits = Perplexity(), torch.zeros(1, 3, 50)
    logits[..., 0] = 300.0  # the softmax of the others underflows
    metric.update(*shifted(logits, torch.tensor([[0, 1, 0]])))
    assert float(metric.compute()) == pytest.approx(math.exp(150), rel=1e-4)


def test_perplexities_add_up_over_ranks():
    one, two = Perplexity(), Perplexity()
    one.update(*shifted(LOGITS[:4], TOKENS[:4]))
    two.update(*shifted(LOGITS[4:], TOKENS[4:]))
    one.total, one.num_tokens = one.total + two.total, one.num_tokens + two.num_tokens  # what the sum over ranks does
    assert float(one.compute()) == pytest.approx(oracle_perplexity(LOGITS, TOKENS), rel=1e-6)
    assert all(fx is not None and fx.__name__ == "dim_zero_sum" for fx in one._reductions.values())


def test_divergence_is_the_oracles():
    metric = Divergence()
    for reference, logits in zip(REFERENCE.split(2), LOGITS.split(2), strict=True):
        metric.update(reference[:, :-1], logits[:, :-1])
    log_p = REFERENCE[:, :-1].double().log_softmax(-1)
    log_q = LOGITS[:, :-1].double().log_softmax(-1)
    values = metric.compute()
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert float(values["kl_divergence"]) == pytest.approx(expected, rel=1e-5)
    agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    assert float(values["top1_agreement"]) == pytest.approx(agreement)
    assert 0 < agreement < 1


def test_divergence_is_that_of_the_reference_from_the_model():
    forward, backward = Divergence(), Divergence()
    forward.update(REFERENCE, LOGITS)
    backward.update(LOGITS, REFERENCE)
    assert float(forward.compute()["kl_divergence"]) != pytest.approx(
        float(backward.compute()["kl_divergence"]), rel=0.01
    )


def test_model_does_not_diverge_from_itself():
    metric = Divergence()
    metric.update(LOGITS, LOGITS)
    values = metric.compute()
    assert float(values["kl_divergence"]) == pytest.approx(0, abs=1e-9)
    assert float(values["top1_agreement"]) == 1
