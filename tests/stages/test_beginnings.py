"""Perplexity with and without the beginning-of-sequence token against whole models, and the advice that follows."""

import math

import pytest
import torch
from tiny_models import load_whole, random_tokens

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.stages.beginnings import Beginnings, compare_beginnings

pytest_plugins = ["tiny_fixtures"]


def perplexity(model, windows, first):
    """Measure all tokens from `first` on, one window at a time."""
    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
        for place in range(first, len(window)):
            total -= float(log_probabilities[place - 1, window[place]])
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("num_windows", [1, 3, 9])
def test_both_beginnings_are_measured_on_the_same_tokens(num_windows, model_folder):
    folder, windows = model_folder("gemma3"), random_tokens(num_windows, 20)
    model = StreamedModel(Checkpoint(str(folder)))
    whole = load_whole(folder)
    sample = windows if num_windows == 1 else windows[1:][-4:]
    begun = sample.clone()
    begun[:, 0] = 0
    found = compare_beginnings(model, model.load_block, windows, bos_token_id=0)
    assert found.with_token == pytest.approx(perplexity(whole, begun, first=2), rel=1e-5)
    assert found.without == pytest.approx(perplexity(whole, sample[:, 1:], first=1), rel=1e-5)


@pytest.mark.parametrize(
    ("beginnings", "bos", "advice"),
    [
        (Beginnings(28.3, 73.6), "stream", "is 28.3 instead of 73.6. Try data.bos=window."),
        (Beginnings(28.3, 73.6), "window", None),
        (Beginnings(40.0, 73.6), "stream", None),
        (Beginnings(100.0, 50.0), "window", "is 50 instead of 100. Try data.bos=stream."),
        (Beginnings(float("nan"), 50.0), "window", None),
    ],
)
def test_advice_where_the_other_choice_halves_the_perplexity(beginnings, bos, advice):
    found = beginnings.advice(bos)
    assert found is None if advice is None else found.endswith(advice)
