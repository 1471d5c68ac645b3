"""Next-token prediction of a mixture of experts, with a loss for an even use of them (Switch, arXiv:2101.03961)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from nowag_pl.functional.ranges import check_real
from nowag_pl.lit.objectives.base import Objective
from nowag_pl.lit.text_module import TextModule
from nowag_pl.models.checkpoint import Checkpoint


class BalancedNextToken(Objective):
    """Train on the next token of the text, and on an even use of experts.

    Args:
        balance: weight of the loss of balance, which is the number of active experts where all are used evenly.
    """

    def __init__(self, balance: float = 0.01) -> None:
        check_real("objective.balance", balance)
        self.balance = balance

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse a model without experts.

        Raises:
            ValueError: it has none.
        """
        if not hasattr(checkpoint.config, "output_router_logits"):
            raise ValueError(
                f"Expected a model with experts for BalancedNextToken, but got one of type "
                f"{checkpoint.config.model_type!r}."
            )

    def losses(self, module: TextModule, batch: dict[str, Tensor]) -> Tensor:
        """Return the negative log-likelihood of every token but the first, plus the loss of balance, by position."""
        tokens = batch["tokens"]
        # A transformers model, whose type only the models may name.
        model: Any = module.get_submodule("model")
        output = model(input_ids=tokens, use_cache=False, output_router_logits=True)
        logits = output.logits[:, :-1].flatten(0, 1).float()
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
        return losses.unflatten(0, (len(tokens), -1)) + self.balance * output.aux_loss

    def settings(self) -> dict[str, Any]:
        """Return the weight of the loss of balance."""
        return {"balance": self.balance}
