"""Measurement of a model on evaluation texts, as a whole or a block at a time, with the logits of a few positions."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from nowag_pl.functional.chunks import position_chunks
from nowag_pl.lit.datamodule import TokenDataModule
from nowag_pl.lit.metrics import Divergence, Perplexity
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.hidden import HiddenStates, Passage, passed

Head = Callable[[slice], Tensor]  # from positions to logits `[batch, positions, vocabulary]`


class DenseReference(Protocol):
    """The predictions with which a compressed model is compared."""

    def head(self, name: str, indices: Tensor) -> Head:
        """Return the function that gives the dense model's logits for windows of an evaluation text."""


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

    def dense_head(self, indices: Tensor) -> Head | None:
        """Return the function that gives the dense model's logits for some windows, if there is a reference."""
        return None if self._reference is None else self._reference.head(self.name, indices)

    def update(self, targets: Tensor, logits: Tensor, dense_logits: Tensor | None) -> None:
        """Add some positions of some windows.

        Args:
            targets: the tokens that came next `[batch, positions]`.
            logits: predictions of them `[batch, positions, vocabulary]`.
            dense_logits: those of the dense model, if there is a reference.
        """
        self._perplexity.update(logits, targets)
        if dense_logits is not None:
            dense_logits = dense_logits.to(logits.device)
            self._dense_perplexity.update(dense_logits, targets)
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

    def head(self, name: str, indices: Tensor) -> Head:
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
        self._vocabulary, self._max_bytes = data.checkpoint.vocab_size, data.eval_chunk_mib * 2**20

    def add(self, number: int, batch: dict[str, Tensor], whole: Callable[[Tensor], Head]) -> None:
        """Add a batch to the metrics of its text.

        Args:
            number: of the text.
            batch: "tokens" `[batch, seq_len]`, "index" `[batch]`, "weight" `[batch]`; padding has weight 0.
            whole: gives the head for tokens, where the model is in memory; every rank calls it, and the head, equally
                often.
        """
        text, real = self._texts[number], batch["weight"] > 0
        tokens, indices = batch["tokens"], batch["index"][real]
        if self._streamed is not None:
            head = self._streamed.head(text.name, indices)
            tokens, real = tokens[real], torch.ones(len(indices), dtype=torch.bool)
        else:
            head = whole(tokens)
        dense_head = text.dense_head(indices) if len(indices) else None
        num_positions = tokens.shape[1] - 1
        for positions in position_chunks(len(tokens), num_positions, self._vocabulary, self._max_bytes):
            logits = head(positions)
            if not real.all():
                logits = logits[real]
            dense_logits = None if dense_head is None else dense_head(positions)
            text.update(tokens[real, 1:][:, positions], logits, dense_logits)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return the figures of every text over all ranks, by their names."""
        return {text.name: text.compute() for text in self._texts}
