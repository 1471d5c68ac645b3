"""The dense model's predictions on given windows, stored in files for comparison and for distillation.

Stored are the hidden states after the last block, a small fraction of the logits' size, which the head turns
into logits when they are needed; or only the most likely tokens, which is smaller still.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nowag_pl.data.tokens import tokens_digest
from nowag_pl.functional.predictions.distillation import distillation_loss, top_distillation_loss, top_log_probabilities
from nowag_pl.functional.ranges import check_real, check_whole
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.arrays import ArrayFolder, SequenceArray
from nowag_pl.run.layout import REFERENCE
from nowag_pl.run.store import ArtefactStore
from nowag_pl.run.wording import readable
from nowag_pl.stages.hidden import HiddenStates, Passage, passed

_log = logging.getLogger("nowag_pl")
TRAINING_TEXT = "training text"


@dataclass(frozen=True)
class TeacherSettings:
    """Settings for distillation from the dense model.

    Attributes:
        temperature: divisor of both models' logits; above 1, unlikely tokens have more weight.
        top_k: store only this many of the dense model's most likely tokens at each position, 8 bytes each, and treat
            the others as one. null: store its hidden states, from which all logits follow.
        batch_size: windows that pass through a block of the dense model together.
    """

    temperature: float = 1.0
    top_k: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_real("model.objective.temperature", self.temperature, above=True)
        check_whole("model.objective.batch_size", self.batch_size, 1)
        if self.top_k is not None:
            check_whole("model.objective.top_k", self.top_k, 1)

    def check(self, vocab_size: int) -> None:
        """Raise ValueError where more of the dense model's tokens are to be kept than there are."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"Expected model.objective.top_k of at most {vocab_size}, the vocabulary, but got {self.top_k}."
            )


def dense_states(
    model: StreamedModel, store: ArtefactStore, windows: Tensor, name: str, batch_size: int
) -> HiddenStates:
    """Return this rank's share of windows after the dense model's last block.

    Args:
        model: dense model.
        store: run directory, whose ranks share the windows.
        windows: `[num_windows, seq_len]`, the same on every rank.
        name: of the text, for the progress bar.
        batch_size: windows that pass through a block together.
    """
    return passed(Passage(model, model.load_block, f"Dense model on {name}"), windows, batch_size, store.ranks)


class DenseReference:
    """Dense logits by text and window.

    Args:
        model: dense model.
        store: run directory.
        windows: name of each text to its windows `[num_windows, seq_len]`.
        batch_size: windows that pass through a block together.
    """

    def __init__(
        self, model: StreamedModel, store: ArtefactStore, windows: Mapping[str, Tensor], batch_size: int
    ) -> None:
        self._model = model
        arrays = ArrayFolder(store.folder / REFERENCE, store.ranks)
        self._hidden: dict[str, SequenceArray] = {}
        for name, tokens in windows.items():
            key = _key(tokens)
            if key not in arrays:
                states = dense_states(model, store, tokens, name, batch_size)
                spec = ((tokens.shape[1], model.hidden_size), model.checkpoint.dtype)
                arrays.write({key: spec}, len(tokens), ((hidden,) for hidden in states.batches()))
            self._hidden[name] = arrays.read(key, model.checkpoint.dtype)

    def logits(self, name: str, indices: Tensor, positions: slice = slice(None)) -> Tensor:
        """Return the dense logits of some windows.

        Args:
            name: text.
            indices: numbers of the windows `[batch]`.
            positions: places of their tokens.

        Returns:
            `[batch, positions, vocabulary]`.
        """
        return self.head(name, indices)(positions)

    def head(self, name: str, indices: Tensor) -> Callable[[slice], Tensor]:
        """Return a function that gives the dense logits `[batch, positions, vocabulary]` of some positions.

        Args:
            name: text.
            indices: numbers of the windows `[batch]`.
        """
        hidden = self._hidden[name].take(indices.tolist())
        return lambda positions: self._model.head(hidden[:, positions])


class Teacher:
    """The loss of a student's predictions against those of the dense model.

    Args:
        model: dense model.
        store: run directory.
        windows: training windows `[num_windows, seq_len]`.
        settings: how.

    Raises:
        ValueError: top_k is larger than the vocabulary.
    """

    def __init__(self, model: StreamedModel, store: ArtefactStore, windows: Tensor, settings: TeacherSettings) -> None:
        self._temperature = settings.temperature
        self._top: tuple[SequenceArray, SequenceArray] | None = None
        top_k = settings.top_k
        settings.check(model.checkpoint.vocab_size)
        entry = 8 * top_k if top_k else model.hidden_size * model.checkpoint.dtype.itemsize
        if store.ranks.is_zero:
            _log.info("Dense predictions for distillation take %s on disk", readable(windows.numel() * entry))
        if top_k is None:
            self._reference = DenseReference(model, store, {TRAINING_TEXT: windows}, settings.batch_size)
            return
        arrays = ArrayFolder(store.folder / REFERENCE, store.ranks)
        key = f"{_key(windows)}_top{top_k}_{self._temperature}"
        values, tokens = f"{key}_values", f"{key}_tokens"
        if values not in arrays or tokens not in arrays:
            states = dense_states(model, store, windows, TRAINING_TEXT, settings.batch_size)
            batches = (
                tuple(
                    part.unflatten(0, hidden.shape[:2]).cpu()
                    for part in top_log_probabilities(model.head(hidden).flatten(0, 1), top_k, self._temperature)
                )
                for hidden in states.batches()
            )
            shape = (windows.shape[1], top_k)
            arrays.write({values: (shape, torch.float32), tokens: (shape, torch.int32)}, len(windows), batches)
        self._top = arrays.read(values, torch.float32), arrays.read(tokens, torch.int32)

    def loss_of(self, indices: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """Return the function that gives the divergence from the dense model on some windows, in nats.

        It maps the student's logits `[batch, positions, vocabulary]` and these positions to losses
        `[batch, positions]`; the teacher's logits are there for these positions alone.

        Args:
            indices: numbers of the windows `[batch]`.
        """
        if self._top is None:
            return self._of_all(self._reference.head(TRAINING_TEXT, indices))
        values, tokens = (array.take(indices.tolist()) for array in self._top)
        return self._of_top(values, tokens)

    def _of_all(self, head: Callable[[slice], Tensor]) -> Callable[[Tensor, slice], Tensor]:
        def loss(logits: Tensor, positions: slice) -> Tensor:
            teacher = head(positions).flatten(0, 1).to(logits.device)
            losses = distillation_loss(teacher, logits.flatten(0, 1), self._temperature)
            return losses.unflatten(0, logits.shape[:2])

        return loss

    def _of_top(self, values: Tensor, tokens: Tensor) -> Callable[[Tensor, slice], Tensor]:
        def loss(logits: Tensor, positions: slice) -> Tensor:
            likeliest, own = (part[:, positions].flatten(0, 1).to(logits.device) for part in (values, tokens))
            losses = top_distillation_loss(likeliest, own, logits.flatten(0, 1), self._temperature)
            return losses.unflatten(0, logits.shape[:2])

        return loss


def _key(tokens: Tensor) -> str:
    return f"{tokens_digest(tokens)[:16]}_{tokens.shape[1]}"
