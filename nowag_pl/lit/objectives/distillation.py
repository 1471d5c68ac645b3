"""Distillation: a compressed model learns the dense model's predictions (Hinton et al., arXiv:1503.02531)."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from nowag_pl.functional.chunks import DISTILLATION_BYTES
from nowag_pl.lit.datamodule import data_of
from nowag_pl.lit.objectives.base import Objective
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.teacher import Teacher, TeacherSettings


class Distillation(Objective):
    """Train a compressed model on the dense model's predictions.

    Args:
        temperature: divisor of the logits of both models; above 1, unlikely tokens have more weight.
        top_k: store only this many of the dense model's most likely tokens at each position, 8 bytes each, and treat
            the others as one. null: store its hidden states, from which all logits follow.
        batch_size: windows that pass through a block of the dense model together.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = None, batch_size: int = 8) -> None:
        self.teacher: TeacherSettings = TeacherSettings(temperature, top_k, batch_size)
        self._teacher: Teacher | None = None

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse to keep more tokens than the vocabulary has."""
        self.teacher.check(checkpoint.vocab_size)

    def prepare(self, module: TextModule) -> None:
        """Record the dense model's predictions on the training text, or find them in the run directory."""
        self._teacher = module.run.teacher(data_of(module.trainer).train_windows, self.teacher)

    def losses(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the divergence from the dense model at every position that predicts, `[batch, seq_len - 1]`."""
        if self._teacher is None:
            raise RuntimeError("Expected prepare before losses.")
        return module.losses(batch["tokens"], self._teacher.loss_of(batch["index"]), DISTILLATION_BYTES)

    def settings(self) -> dict[str, Any]:
        """Return all settings except the batch size, which does not affect the result."""
        return {name: value for name, value in asdict(self.teacher).items() if name != "batch_size"}
