"""Routed experts as one linear for each expert and projection, run by a loop over those that tokens are routed to.

Transformers keeps the weights of a block's experts in fused tensors and multiplies them by grouped products, which pass
by every linear. Here each linear is called with the tokens of its expert, so that it can be observed, compressed and
trained as any other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

Gating = Callable[[Tensor | None, Tensor], Tensor]  # outputs of gate_proj (None without one) and up_proj
IN_PROJECTIONS = ("gate_proj", "up_proj")
DOWN = "down_proj"


class ExpertSizes(NamedTuple):
    """The linears of one expert.

    Attributes:
        hidden: length of a hidden state.
        intermediate: length of the input of `down_proj`.
        has_gate: whether there is a `gate_proj`.
        has_bias: whether the linears have biases.
    """

    hidden: int
    intermediate: int
    has_gate: bool = True
    has_bias: bool = False


class Place(NamedTuple):
    """The place of an expert's weight or bias in a fused tensor, whose first index is the expert.

    Attributes:
        fused: name of the fused tensor beside the experts.
        expert: number of the expert.
        part: 0 for the gate's half of the outputs, 1 for the other half; None for all outputs.
        is_transposed: whether inputs come before outputs.
        is_concatenated: whether the halves stand one after the other, not row by row in turn.
    """

    fused: str
    expert: int
    part: int | None
    is_transposed: bool = False
    is_concatenated: bool = True

    def take(self, stored: Tensor) -> Tensor:
        """Return the weight `[out, in]` or bias `[out]`, given all that the fused tensor holds of the expert."""
        outputs = stored.T if self.is_transposed else stored
        return outputs[self._rows(len(outputs))].contiguous()

    def put(self, fused: Tensor, tensor: Tensor) -> None:
        """Write the weight or bias into the fused tensor, in place."""
        outputs = fused[self.expert].T if self.is_transposed else fused[self.expert]
        outputs[self._rows(len(outputs))] = tensor

    def fused_shape(self, shape: Sequence[int], count: int) -> list[int]:
        """Return the shape of the fused tensor of so many experts, given that of one weight or bias."""
        own = [shape[0] * (1 if self.part is None else 2), *shape[1:]]
        return [count, *(own[::-1] if self.is_transposed else own)]

    def _rows(self, count: int) -> slice:
        if self.part is None:
            return slice(None)
        half = count // 2
        return slice(self.part * half, (self.part + 1) * half) if self.is_concatenated else slice(self.part, None, 2)


class Expert(nn.Module):
    """One expert: `down_proj(gating(gate_proj(x), up_proj(x)))`.

    Args:
        sizes: its linears, whose weights are random.
        gating: activation of the intermediate values.
    """

    gate_proj: nn.Module | None
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, sizes: ExpertSizes, gating: Gating) -> None:
        super().__init__()
        hidden, intermediate, has_gate, has_bias = sizes
        self.gate_proj = nn.Linear(hidden, intermediate, has_bias) if has_gate else None
        self.up_proj = nn.Linear(hidden, intermediate, has_bias)
        self.down_proj = nn.Linear(intermediate, hidden, has_bias)
        self.gating = gating

    def intermediate(self, hidden: Tensor) -> Tensor:
        """Return the input of `down_proj`, `[tokens, intermediate]`, for hidden states `[tokens, hidden]`."""
        gate = None if self.gate_proj is None else self.gate_proj(hidden)
        return self.gating(gate, self.up_proj(hidden))

    def forward(self, hidden: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the expert's share of the block's output.

        Args:
            hidden: the tokens that are routed to it, `[tokens, hidden]`.
            weights: the router's weight of each, `[tokens]`; None: 1.
        """
        output = self.down_proj(self.intermediate(hidden))
        return output if weights is None else output * weights[:, None]


class RoutedExperts(nn.ModuleList):
    """The experts of a block.

    Args:
        count: number of experts.
        sizes: the linears of each.
        gating: as for :class:`Expert`, the same for all.
        places: where the tensors of its linears stand in fused ones, by name, such as "3.gate_proj.weight".
    """

    def __init__(self, count: int, sizes: ExpertSizes, gating: Gating, places: Mapping[str, Place]) -> None:
        super().__init__(Expert(sizes, gating) for _ in range(count))
        self.places = places

    def __iter__(self) -> Iterator[Expert]:
        """Iterate over the experts."""
        return cast(Iterator[Expert], super().__iter__())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of every token's experts, `[tokens, hidden]`.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: numbers of each token's experts, `[tokens, k]`.
            top_k_weights: the router's weights of them, `[tokens, k]`.
        """
        output = torch.zeros_like(hidden_states)
        weights, num_chosen = top_k_weights.reshape(-1), top_k_index.shape[-1]
        for expert, places in self._dispatched(top_k_index.reshape(-1)):
            tokens = places // num_chosen
            share = expert(hidden_states[tokens], weights[places])
            output.index_add_(0, tokens, share.to(output.dtype))
        return output

    def _dispatched(self, chosen: Tensor) -> Iterator[tuple[Expert, Tensor]]:
        """Yield each expert that is chosen, and the places where it is; every expert while any of them is trained.

        Processes can then average the gradients of experts that have no tokens in some of them.
        """
        places = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=len(self)).tolist()
        are_trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        start = 0
        for number, count in enumerate(counts):
            if count or are_trained:
                yield cast(Expert, self[number]), places[start : start + count]
            start += count

    def entering(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        """Return all tokens that enter the experts, whichever they are routed to, `[tokens, hidden]`.

        Args:
            hidden_states: the first argument of :meth:`forward`.
        """
        return hidden_states


class ScaledExperts(RoutedExperts):
    """Experts whose inputs the router has weighted already, as in Llama 4: a row of zeros is routed elsewhere."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs of every expert, `[experts * tokens, hidden]`.

        Args:
            hidden_states: weighted tokens for each expert, one expert after the other, `[experts * tokens, hidden]`.
        """
        output = torch.zeros_like(hidden_states)
        rows = hidden_states.ne(0).any(dim=-1).nonzero()[:, 0]
        for expert, places in self._dispatched(rows // (len(hidden_states) // len(self))):
            share = expert(hidden_states[rows[places]])
            output.index_add_(0, rows[places], share.to(output.dtype))
        return output

    def entering(self, hidden_states: Tensor, *_: Tensor) -> Tensor:
        """Return the weighted tokens of all experts together."""
        return hidden_states[hidden_states.ne(0).any(dim=-1)]
