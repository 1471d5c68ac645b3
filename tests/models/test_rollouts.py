"""Sampled answers, and the probabilities of their tokens."""

import pytest
import torch
from tiny_models import load_whole

from nowag_pl.models.rollouts import (
    Answers,
    SamplingSettings,
    drawn_tokens,
    sample_answers,
    stop_tokens,
    token_log_probabilities,
    uniform_draws,
)

pytest_plugins = ["tiny_fixtures"]
PROMPTS = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [10, 11]]
SAMPLES = [(0, 0), (1, 0), (0, 1), (2, 0)]
STOPS = list(range(100, 400))  # many, so that a random model stops now and then


@pytest.fixture(scope="module")
def model(model_folder):
    return load_whole(model_folder())


def answers(model, **settings) -> Answers:
    sampling = SamplingSettings(max_new_tokens=12, **settings)
    return sample_answers(model, PROMPTS, uniform_draws(sampling, 3, SAMPLES), sampling, STOPS)


def test_tokens_are_drawn_by_their_probabilities():
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 1.0]])
    draws = torch.linspace(0, 1, 4001)[:-1, None]
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)]:
        found = drawn_tokens(logits.expand(4000, -1), draws, temperature, top_p)
        expected = (logits[0].double() / temperature).softmax(0)
        if top_p < 1:  # 0.67 is not enough, so the second counts as well
            expected = expected * torch.tensor([0, 1, 0, 1])
            expected = expected / expected.sum()
        shares = torch.bincount(found.flatten(), minlength=4) / 4000
        torch.testing.assert_close(shares.double(), expected, atol=1e-3, rtol=0)


def test_answers_depend_neither_on_their_batch_nor_on_the_order(model):
    whole, parts = answers(model), answers(model, batch_size=1)
    assert torch.equal(whole.mask, parts.mask)
    assert torch.equal(whole.tokens[whole.mask], parts.tokens[parts.mask])
    assert not torch.equal(whole.tokens[0], whole.tokens[2])
    other = answers(model, seed=1)
    assert not torch.equal(whole.tokens[0, :1], other.tokens[0, :1])


def test_answer_ends_with_its_first_stop_token(model):
    found = answers(model)
    for tokens, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True):
        places = [place for place, token in enumerate(tokens) if token in STOPS]
        assert length == (places[0] + 1 if places else 12)
    assert len(set(found.lengths.tolist())) > 1
    assert not model.training


def test_log_probabilities_are_those_of_each_answer_alone(model):
    found = answers(model)
    with torch.no_grad():
        log_p, entropy = token_log_probabilities(model, found, 0.7)
    for row, prompt in enumerate(PROMPTS):
        length = int(found.lengths[row])
        tokens = torch.tensor([*prompt, *found.tokens[row, :length].tolist()])
        with torch.no_grad():
            expected = (model(tokens[None]).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        chosen = expected.gather(1, tokens[len(prompt) :, None])[:, 0]
        torch.testing.assert_close(log_p[row, :length], chosen, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(entropy[row, :length], -(expected.exp() * expected).sum(-1), atol=1e-4, rtol=1e-4)


def test_stop_tokens_are_those_of_the_generation_settings(model, model_folder):
    from nowag_pl.models.checkpoint import Checkpoint

    tokenizer = Checkpoint(str(model_folder())).tokenizer
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [3, 4]
    assert stop_tokens(model, tokenizer) == [3, 4]
    model.generation_config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokens that end an answer"):
        stop_tokens(model, tokenizer)
    model.generation_config.eos_token_id = before


@pytest.mark.parametrize(
    ("name", "value"), [("group_size", 0), ("max_new_tokens", 1.5), ("temperature", 0.0), ("top_p", 1.1), ("seed", -1)]
)
def test_settings_refuse_numbers_out_of_their_range(name, value):
    with pytest.raises(ValueError, match=f"sampling.{name}"):
        SamplingSettings(**{name: value})
