"""A language model as its data and its training objective see it."""

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from nowag_pl.functional.chunks import LOSS_BYTES
from nowag_pl.lit.batches import ResumableLoader
from nowag_pl.models.adapters import AdapterSettings
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.heads import PositionLoss
from nowag_pl.stages.compression_run import CompressionRun


class TextModule(LightningModule):
    """A module that maps tokens `[batch, seq_len]` to logits `[batch, seq_len, vocabulary]`.

    Attributes:
        checkpoint: its model on disk, with the tokenizer.
        adapters: low-rank matrices that are trained in the place of the model; None: the model itself is.
    """

    checkpoint: Checkpoint
    adapters: AdapterSettings | None

    @property
    def run(self) -> CompressionRun:
        """The stages over its dense model."""
        raise NotImplementedError

    @property
    def whole(self) -> nn.Module:
        """The model in memory, a transformers model."""
        raise NotImplementedError

    @property
    def is_sharded(self) -> bool:
        """Whether every process holds a part of the parameters."""
        raise NotImplementedError

    def starting_model(self) -> nn.Module:
        """Return another copy of the model as it was before end-to-end training, without gradients."""
        raise NotImplementedError

    def own_train_dataloader(self) -> ResumableLoader | None:
        """Return the batches to train on; None for those of the data module."""
        return None

    def losses(self, tokens: Tensor, loss: PositionLoss, logit_bytes: int = LOSS_BYTES) -> Tensor:
        """Return the loss of every position that predicts a token, for some of whose logits there is memory at a time.

        Args:
            tokens: `[batch, seq_len]`.
            loss: from logits `[batch, positions, vocabulary]` and their positions to losses `[batch, positions]`.
            logit_bytes: memory that it takes for each logit.

        Returns:
            `[batch, seq_len - 1]`.
        """
        raise NotImplementedError

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state as torch does.

        Raises:
            ValueError: it is of another model or method.
        """
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            _, _, problems = str(error).partition("\n")
            problem = shorten(problems, 200, placeholder=" ...")
            raise ValueError(f"Expected a checkpoint of this model and method, but got: {problem}") from error
