"""The declared base of objectives: a loss for every predicted token, and its needs in addition to the model."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from nowag_pl.lit.batches import ResumableLoader
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.teacher import TeacherSettings


class Objective(ABC):
    """A loss that end-to-end training minimises.

    Lifecycle: `check` before anything is computed; `prepare` when the training is set up, after every process has
    started and before anything is wrapped; `train_dataloader` once; `losses` at every step.

    Attributes:
        teacher: settings for recording the dense model's predictions on the training text; None if they are not used.
    """

    teacher: TeacherSettings | None = None

    @property
    def needs_dense(self) -> bool:
        """Whether it compares with the dense model, and so needs a run that compresses."""
        return self.teacher is not None

    def check(self, checkpoint: Checkpoint) -> None:  # noqa: B027 - few need it
        """Refuse settings that do not fit the model.

        Raises:
            ValueError: one does not; the message names it.
        """

    def prepare(self, module: TextModule) -> None:  # noqa: B027 - few need it
        """Prepare the training of a module; called on every rank, and again when a training continues."""

    def train_dataloader(self, module: TextModule) -> ResumableLoader | None:
        """Return batches of its own, with "tokens", "index" and "weight"; None for those of the data module."""
        return None

    @abstractmethod
    def losses(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of every position that counts, `[batch, positions]`, in nats.

        Args:
            module: the model; calling it gives logits.
            batch: "tokens" `[batch, seq_len]` and "index" `[batch]`, the numbers of the windows in the training text.
        """

    def settings(self) -> dict[str, Any]:
        """Return the JSON values on which the result depends, for the manifest."""
        return {}
