"""One decoder block under Lightning, trained to match target hidden states."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map
from torchmetrics import MeanMetric

from nowag_pl.lit.sharding import ignore_buffers_in_ddp
from nowag_pl.run.wording import HELD_OUT_ERROR as ERROR

_NEVER = 10**9


class BlockModule(LightningModule):
    """A block whose outputs, or those of its parts, are trained to match targets, in mean squared error by `scale`.

    Args:
        block: the block; all of its parameters are trained, held in float32.
        forward_block: `(block, hidden, arguments) -> ` what is compared with the targets.
        arguments: `(batch_size, seq_len) -> ` the block's arguments other than hidden states.
        scale: mean square of the targets minus what no block gives; an error of 1 is as good as no block at all.
        learning_rate: learning rate of AdamW.
        plateau_patience: epochs without a lower held-out error after which the learning rate is halved.
    """

    def __init__(
        self,
        block: nn.Module,
        forward_block: Callable[[nn.Module, Tensor, dict[str, Any]], Tensor],
        arguments: Callable[[int, int], dict[str, Any]],
        scale: float,
        learning_rate: float,
        plateau_patience: int,
    ) -> None:
        super().__init__()
        self.block = block
        for parameter in block.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        ignore_buffers_in_ddp(self)
        self._forward_block = forward_block
        self._arguments = arguments
        self._scale = scale
        self._learning_rate = learning_rate
        self._plateau_patience = plateau_patience
        self._held_out = MeanMetric()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states after the block, `[batch, seq_len, hidden]`, for those before it."""
        hidden = hidden.float()
        arguments = tree_map(
            lambda value: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value,
            self._arguments(*hidden.shape[:2]),
        )
        return self._forward_block(self.block, hidden, arguments)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Relative error, averaged over sequences."""
        loss = (self._errors(batch) * batch["weight"]).sum()
        self.log("train/error", loss, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add to the held-out error."""
        real = batch["weight"] > 0
        if real.any():
            self._held_out.update(self._errors(batch)[real])
        self.log(ERROR, self._held_out, on_step=False, on_epoch=True, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Step the scheduler."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, ReduceLROnPlateau)
        scheduler.step(self._held_out.compute())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the learning rate is halved when the held-out error does not fall."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self._learning_rate, weight_decay=0.0)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=self._plateau_patience)
        # Lightning would step it after the checkpoint of the epoch, which could not be resumed exactly.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": ERROR, "frequency": _NEVER}}

    def _errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the relative error of each sequence, `[batch]`."""
        difference = self(batch["hidden"]).float() - batch["target"].float()
        return difference.square().mean(dim=(1, 2)) / self._scale
