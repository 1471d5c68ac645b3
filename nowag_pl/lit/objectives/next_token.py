"""Next-token prediction: the cross-entropy with the text itself."""

import torch.nn.functional as F
from torch import Tensor

from nowag_pl.lit.objectives.base import Objective
from nowag_pl.lit.text_module import TextModule


class NextToken(Objective):
    """Train on the next token of the text."""

    def losses(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the negative log-likelihood of every token but the first, `[batch, seq_len - 1]`."""
        tokens = batch["tokens"]

        def loss(logits: Tensor, positions: slice) -> Tensor:
            targets = tokens[:, 1:][:, positions]
            # The classes stand second.
            return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")

        return module.losses(tokens, loss)
