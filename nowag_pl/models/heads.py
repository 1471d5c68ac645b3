"""The head of a whole model apart from its blocks, so that the logits of a few positions are in memory at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


def logits_of(model: "PreTrainedModel", hidden: Tensor, in_training: bool = False) -> Tensor:
    """Return the logits `[batch, positions, vocabulary]` of hidden states, with all that a family does to them.

    Args:
        model: a whole model, possibly sharded.
        hidden: some positions of the result of :func:`last_hidden`.
        in_training: whether this is a part of a step, in which a sharded model holds its head whole since then.
    """
    name = _base_name(model)
    base = model.get_submodule(name)
    tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    model.set_submodule(name, _Ended(hidden))
    try:
        # In a step without the hooks of FSDP2, which would take the head for a model of its own.
        run = model.forward if in_training else model
        return run(input_ids=tokens, use_cache=False).logits
    finally:
        model.set_submodule(name, base)


PositionLoss = Callable[[Tensor, slice], Tensor]


def chunked_losses(model: "PreTrainedModel", hidden: Tensor, parts: Sequence[slice], loss: PositionLoss) -> Tensor:
    """Return the losses of positions, whose logits are there for some of them at a time, for their gradients as well.

    Where there is more than one part, logits are computed once more when gradients are.

    Args:
        model: a whole model, possibly sharded, of which `hidden` was computed in this step.
        hidden: result of :func:`last_hidden`.
        parts: positions that are in memory together, in order.
        loss: from logits `[batch, positions, vocabulary]` and these positions to losses `[batch, positions]`.

    Returns:
        `[batch, positions]`, over all parts.
    """

    def of_part(states: Tensor, part: slice) -> Tensor:
        return loss(logits_of(model, states, in_training=True), part)

    if len(parts) == 1:
        return of_part(hidden[:, parts[0]], parts[0])
    return torch.cat([checkpoint(of_part, hidden[:, part], part, use_reentrant=False) for part in parts], dim=1)


def recompute_activations(model: "PreTrainedModel") -> None:
    """Let the blocks of a model keep their inputs alone while it is trained, and compute the rest again for gradients.

    Raises:
        ValueError: its family does not know how.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"Expected model.recompute=false, as {type(model).__name__} cannot compute its activations again."
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


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
