"""The head of a whole model apart from its blocks, so that the logits of a few positions are in memory at a time."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nowag_pl.models.streaming import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_hidden(model: "PreTrainedModel", tokens: Tensor) -> Tensor:
    """Return what the head of a model is given, `[batch, seq_len, hidden]`, after the norm that follows the blocks.

    Args:
        model: a whole model, possibly sharded.
        tokens: `[batch, seq_len]`.
    """
    found: list[Tensor] = []
    handle = model.get_submodule(_base_name(model)).register_forward_hook(
        lambda _module, _arguments, output: found.append(output[0])
    )
    try:
        # As a whole, so that a sharded model gathers its parameters.
        model(input_ids=tokens, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return found[0]


def logits_of(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """Return the logits `[batch, positions, vocabulary]` of hidden states, with all that a family does to them.

    Args:
        model: a whole model, possibly sharded.
        hidden: some positions of the result of :func:`last_hidden`.
    """
    name = _base_name(model)
    base = model.get_submodule(name)
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    model.set_submodule(name, _Ended(hidden))
    try:
        return model(input_ids=tokens, use_cache=False).logits
    finally:
        model.set_submodule(name, base)


def _base_name(model: "PreTrainedModel") -> str:
    """Return the name of the embeddings and blocks, which is not always the one that a family gives as its prefix."""
    return find_blocks(model).rpartition(".")[0] if model.base_model is model else model.base_model_prefix


class _Ended(nn.Module):
    """Takes the place of the embeddings and blocks, whose output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *_positional: Any, **_named: Any) -> Any:
        # Models with experts ask for what their routers said, too.
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self._hidden)
