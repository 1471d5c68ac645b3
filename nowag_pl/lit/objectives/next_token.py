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
        logits = module(tokens)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return losses.unflatten(0, (len(tokens), -1))
