"""The declared base of objectives: a loss, and its needs in addition to the model."""

from typing import Any

from torch import Tensor

from nowag_pl.lit.batches import ResumableLoader
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.stages.teacher import TeacherSettings


class Objective:
    """A loss that end-to-end training minimises.

    One of `losses` and `loss` must be written: `losses` where every window of text counts alike.

    Lifecycle: `check` before anything is computed; `prepare` when the training is set up, after every process has
    started and before anything is wrapped; `train_dataloader` once; `loss` at every step; `state_dict` for every
    checkpoint.

    Attributes:
        teacher: settings for recording the dense model's predictions on the training text; None if they are not used.
        reads_text: whether it trains on the windows of the calibration text.
        accumulates: whether several batches may make a step (trainer.accumulate_grad_batches).
        logged: names of what it logs beside the loss.
    """

    teacher: TeacherSettings | None = None
    reads_text = True
    accumulates = True
    logged: tuple[str, ...] = ()

    @property
    def needs_dense(self) -> bool:
        """Whether it compares with the dense model, and so needs a run that compresses."""
        return self.teacher is not None

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse settings that do not fit the model.

        Raises:
            ValueError: one does not; the message names it.
        """

    def prepare(self, module: TextModule) -> None:
        """Prepare the training of a module; called on every rank, and again when a training continues."""

    def train_dataloader(self, module: TextModule) -> ResumableLoader | None:
        """Return batches of its own, with "index" and "weight"; None for those of the data module."""
        return None

    def loss(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of this rank; the mean over the ranks is that of the step.

        Args:
            module: the model; calling it gives logits.
            batch: "tokens" `[batch, seq_len]`, "index" `[batch]`, the numbers of the windows in the training text, and
                "weight" `[batch]`, the ranks divided by all windows of the step; 0 for padding.
        """
        return (self.losses(module, batch).mean(dim=1) * batch["weight"]).sum()

    def losses(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of every position that counts, `[batch, positions]`, in nats; arguments as for `loss`."""
        raise NotImplementedError(f"Expected {type(self).__name__} to have losses or loss, but it has neither.")

    def settings(self) -> dict[str, Any]:
        """Return the JSON values on which the result depends, for the manifest."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as plain values and tensors; called on all ranks."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""

    def report(self) -> dict[str, Any] | None:
        """Return what the report shows of the training, as JSON values; None for nothing."""
        return None
