"""How well a model predicts a text with and without the beginning-of-sequence token before it, on a small sample."""

from collections.abc import Callable
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nowag_pl.data.tokens import BosPlace, begin_windows
from nowag_pl.functional.chunks import position_chunks
from nowag_pl.functional.predictions.divergence import negative_log_likelihood
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.stages.hidden import HiddenStates

NUM_WINDOWS, NUM_TOKENS = 4, 256


class Beginnings(NamedTuple):
    """Perplexities of the same tokens of a sample.

    Attributes:
        with_token: after the beginning-of-sequence token.
        without: with nothing before the text.
    """

    with_token: float
    without: float

    def advice(self, bos: BosPlace) -> str | None:
        """Return a warning if the other choice than `bos` would at least halve the perplexity.

        >>> print(Beginnings(28.3, 73.6).advice("window"))
        None
        """
        ours, other = (self.with_token, self.without) if bos == "window" else (self.without, self.with_token)
        if not 2 * other <= ours:
            return None
        better = "stream" if bos == "window" else "window"
        words = "without" if bos == "window" else "after"
        return (
            f"data.bos is {bos}, but {words} the beginning-of-sequence token the dense model's perplexity of a sample "
            f"is {other:.4g} instead of {ours:.4g}. Try data.bos={better}."
        )


@torch.no_grad()
def compare_beginnings(
    model: StreamedModel, load_block: Callable[[int], nn.Module], windows: Tensor, bos_token_id: int
) -> Beginnings:
    """Measure the perplexity of a few windows with and without the beginning-of-sequence token.

    Args:
        model: dense or compressed model.
        load_block: gives a block of it.
        windows: of a text, `[num_windows, seq_len]`, with or without the token, in whose place another is put.
        bos_token_id: the token.
    """
    # The first window of a stream has the token already, if there are others.
    sample = windows[-min(NUM_WINDOWS, max(len(windows) - 1, 1)) :, : NUM_TOKENS + 1].long()
    return Beginnings(
        _perplexity(model, load_block, begin_windows(sample, bos_token_id), skip=1),
        _perplexity(model, load_block, sample[:, 1:], skip=0),
    )


def _perplexity(model: StreamedModel, load_block: Callable[[int], nn.Module], windows: Tensor, skip: int) -> float:
    """Return the perplexity of all tokens but the first, and `skip` more."""
    states = HiddenStates(model, windows, len(windows))
    for index in range(len(model)):
        states.run(load_block(index).to(model.device), index)
    (hidden,), targets, total = states.batches(), windows[:, skip + 1 :].to(model.device), 0.0
    for chunk in position_chunks(len(targets), targets.shape[1], model.checkpoint.vocab_size):
        positions = slice(chunk.start + skip, chunk.stop + skip)
        logits = model.head(hidden[:, positions]).flatten(0, 1)
        total += float(negative_log_likelihood(logits, targets[:, chunk].flatten()))
    return exp(min(total / max(targets.numel(), 1), 700.0))
