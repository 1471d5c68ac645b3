"""Measurement of a model on evaluation texts, as a whole or a block at a time, with the logits of a few positions."""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.hidden import HiddenStates, Passage, passed
from nowag_pl.stages.sizes import MEASURED_TOKENS


class DenseReference(Protocol):
    """The predictions with which a compressed model is compared."""

    def logits(self, name: str, indices: Tensor, positions: slice) -> Tensor:
        """Return the dense model's logits `[batch, positions, vocabulary]` for windows of an evaluation text."""


class TextMetrics:
    """Perplexity on one text, and the divergence from the dense model if there is a reference.

    Args:
        name: the text.
        device: device of the logits.
        reference: the dense model's predictions.
    """

    def __init__(self, name: str, device: torch.device, reference: DenseReference | None) -> None:
        self.name = name
        self._reference = reference
        self._perplexity, self._dense_perplexity = Perplexity().to(device), Perplexity().to(device)
        self._divergence = Divergence().to(device)

    def update(self, indices: Tensor, tokens: Tensor, positions: slice, logits: Tensor) -> None:
        """Add some positions of some windows.

        Args:
            indices: numbers of the windows `[batch]`.
            tokens: the windows `[batch, seq_len]`.
            positions: places of their tokens.
            logits: predictions at them `[batch, positions, vocabulary]`.
        """
        self._perplexity.update(logits, tokens[:, positions])
        if self._reference is not None:
            dense_logits = self._reference.logits(self.name, indices, positions).to(logits.device)
            self._dense_perplexity.update(dense_logits, tokens[:, positions])
            self._divergence.update(dense_logits, logits)

    def compute(self) -> dict[str, Tensor]:
        """Return the figures over all ranks by their names."""
        figures = {"perplexity": self._perplexity.compute()}
        if self._reference is not None:
            figures["dense_perplexity"] = self._dense_perplexity.compute()
            figures |= self._divergence.compute()
        return figures


class StreamedTexts:
    """Evaluation texts after the last block of a model that is read a block at a time.

    Args:
        model: embeddings, head, and the arguments of the blocks.
        load_block: gives a block, dense or compressed.
        data: texts; each rank has its share of their windows.
    """

    def __init__(self, model: StreamedModel, load_block: Callable[[int], nn.Module], data: TokenDataModule) -> None:
        self._model = model
        self._ranks = Ranks.current()
        self._texts: dict[str, HiddenStates] = {
            name: passed(Passage(model, load_block, f"Model on {name}"), windows, data.eval_batch_size, self._ranks)
            for name, windows in data.eval_windows.items()
        }

    def head(self, name: str, indices: Tensor) -> Callable[[slice], Tensor]:
        """Return a function that gives the logits `[batch, positions, vocabulary]` of some positions.

        Args:
            name: text.
            indices: numbers of windows that this rank has `[batch]`.
        """
        rows = (indices // self._ranks.world_size).tolist()
        # A rank with padding alone has no windows, and is asked for no positions.
        hidden = self._texts[name].take(rows) if rows else torch.empty(0)
        return lambda positions: self._model.head(hidden[:, positions])


class Validation:
    """One validation of a model on all evaluation texts.

    Args:
        data: the texts.
        device: device of the logits.
        reference: the dense model's predictions, if the model is compared with them.
        streamed: the texts after the last block; None if the whole model is in memory.
    """

    def __init__(
        self,
        data: TokenDataModule,
        device: torch.device,
        reference: DenseReference | None = None,
        streamed: StreamedTexts | None = None,
    ) -> None:
        self._texts = [TextMetrics(name, device, reference) for name in data.eval_names]
        self._streamed = streamed

    def add(self, number: int, batch: dict[str, Tensor], whole: Callable[[Tensor], Tensor]) -> None:
        """Add a batch to the metrics of its text.

        Args:
            number: of the text.
            batch: "tokens" `[batch, seq_len]`, "index" `[batch]`, "weight" `[batch]`; padding has weight 0.
            whole: tokens to logits `[batch, seq_len, vocabulary]`, where the model is in memory; every rank calls it
                equally often.
        """
        text, real = self._texts[number], batch["weight"] > 0
        tokens, indices = batch["tokens"][real], batch["index"][real]
        if self._streamed is not None:
            head = self._streamed.head(text.name, indices)
        else:
            logits = whole(batch["tokens"])[real]
            head = lambda positions: logits[:, positions]  # noqa: E731
        for positions in chunks(tokens):
            text.update(indices, tokens, positions, head(positions))

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the figures of every text over all ranks, by their names."""
        return {text.name: text.compute() for text in self._texts}


def chunks(tokens: Tensor) -> Iterator[slice]:
    """Yield positions of windows `[batch, seq_len]` whose logits are in memory together; they overlap by one.

    The last position of a chunk predicts the first token of the next, which is measured there.
    """
    batch, seq_len = tokens.shape
    size = max(MEASURED_TOKENS // max(batch, 1), 1)
    for start in range(0, seq_len - 1 if batch else 0, size):
        yield slice(start, start + size + 1)
