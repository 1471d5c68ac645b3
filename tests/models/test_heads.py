"""Logits of a few positions of a whole model against transformers' own."""

import pytest
import torch
from tiny_models import FAMILIES, load_whole, random_tokens

from nowag_pl.models.heads import last_hidden, logits_of

pytest_plugins = ["tiny_fixtures"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_some_positions_are_those_of_the_model(family, model_folder):
    model, tokens = load_whole(model_folder(family)), random_tokens(2)
    with torch.no_grad():
        expected = model(tokens).logits
        hidden = last_hidden(model, tokens)
        for positions in (slice(0, 5), slice(5, 32)):
            actual = logits_of(model, hidden[:, positions])
            torch.testing.assert_close(actual, expected[:, positions], atol=1e-6, rtol=1e-6)
        assert torch.equal(model(tokens).logits, expected)


def test_model_is_whole_again_after_an_error(model_folder):
    model = load_whole(model_folder())
    base = model.base_model
    with pytest.raises(RuntimeError):
        logits_of(model, torch.zeros(1, 2, 7))
    assert model.base_model is base
    with pytest.raises(IndexError):
        last_hidden(model, torch.full((1, 2), 10**6))
    assert not base._forward_hooks
