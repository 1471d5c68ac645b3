"""Second moments of the inputs of experts, each of which sees only the tokens that are routed to it.

A token counts by the router's weight of it (MoEQuant, arXiv:2505.03804). The moments of an expert that has seen few
tokens are shrunk towards those that it would have with all tokens of the block, so that one that has seen none has
these; `gate_proj` and `up_proj` of an expert have the same.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from nowag_pl.functional.moments import shrunk
from nowag_pl.modules.experts import DOWN, RoutedExperts
from nowag_pl.modules.moments import SecondMoment, WeightedMoment
from nowag_pl.run.ranks import Ranks

# Of each batch, so many tokens pass through every expert, wherever they are routed: for all of them, a block of 128
# experts would take 16 times as long.
_SAMPLED = 256


class ExpertMoments(NamedTuple):
    """What is known of the experts of a block.

    Attributes:
        moments: second moment of every selected linear by name, `[in]` or `[in, in]`, float32 in host memory.
        num_tokens: tokens that entered the experts.
        tokens: tokens that were routed to each expert.
    """

    moments: dict[str, Tensor]
    num_tokens: int
    tokens: list[int]


class ObservedExperts:
    """Second moments of the inputs of experts, between :meth:`attach` and :meth:`detach`.

    Args:
        experts: the experts.
        names: the linears to observe, such as "3.gate_proj".
        full: whether to gather the matrices of x x^T.
        shrinkage: tokens that the moments over all tokens of the block count for.
    """

    def __init__(self, experts: RoutedExperts, names: Collection[str], full: bool, shrinkage: float) -> None:
        self._experts, self._names, self._full, self._shrinkage = experts, list(names), full, shrinkage
        count, device = len(experts), next(experts.parameters()).device
        # Of the inputs of `down_proj` (True) and of the others (False), as far as a selected linear has them.
        sizes = {name.endswith(DOWN): cast(nn.Linear, experts.get_submodule(name)).in_features for name in names}
        self._routed = {
            side: [WeightedMoment(size, full).to(device) for _ in range(count)] for side, size in sizes.items()
        }
        self._all = {
            side: [SecondMoment(size, full).to(device) for _ in range(count if side else 1)]
            for side, size in sizes.items()
        }
        self._counts, self._entered = [0] * count, 0
        self._weights: Tensor
        self._handles: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Begin to observe."""
        self._handles.append(self._experts.register_forward_pre_hook(lambda _, args: self._enter(*args)).remove)
        for number, expert in enumerate(self._experts):
            hook = expert.register_forward_pre_hook(lambda _, args, number=number: self._route(number, *args))
            self._handles.append(hook.remove)
            if True in self._routed:
                last = expert.get_submodule(DOWN)
                hook = last.register_forward_pre_hook(lambda _, args, number=number: self._finish(number, args[0]))
                self._handles.append(hook.remove)

    def detach(self) -> None:
        """Stop observing."""
        while self._handles:
            self._handles.pop()()

    @torch.no_grad()
    def _enter(self, *arguments: Tensor) -> None:
        """Add all tokens that enter the experts, whichever they are routed to."""
        tokens = self._experts.entering(*arguments)
        self._entered += len(tokens)
        if False in self._all:
            self._all[False][0].update(tokens)
        sample = tokens[:: max(len(tokens) // _SAMPLED, 1)]
        for expert, moment in zip(self._experts, self._all.get(True, []), strict=False):
            moment.update(expert.intermediate(sample))

    @torch.no_grad()
    def _route(self, number: int, tokens: Tensor, weights: Tensor | None = None) -> None:
        """Add the tokens of an expert."""
        if not len(tokens):
            return
        self._counts[number] += len(tokens)
        counted = tokens.new_ones(len(tokens)) if weights is None else weights
        if False in self._routed:
            self._routed[False][number].update(tokens, counted)
        self._weights = counted

    @torch.no_grad()
    def _finish(self, number: int, intermediate: Tensor) -> None:
        """Add the inputs of an expert's `down_proj`, of the tokens that it was called with last."""
        if len(intermediate):
            self._routed[True][number].update(intermediate, self._weights)

    def compute(self, ranks: Ranks, title: str) -> ExpertMoments:
        """Reduce over the ranks; all of them must call.

        Args:
            ranks: the processes of the run.
            title: whole name of the experts.

        Raises:
            ValueError: an activation is NaN or infinite; the message names the linear.
        """
        for moment in (*chain(*self._routed.values()), *chain(*self._all.values())):
            moment.all_reduce()
        shares = ranks.gather((self._counts, self._entered))
        tokens = [sum(counts) for counts in zip(*(counts for counts, _ in shares), strict=True)]
        computed: dict[tuple[int, bool], Tensor] = {}
        for name in self._names:
            key = (int(name.partition(".")[0]), name.endswith(DOWN))
            if key not in computed:
                with naming(f"{title}.{name}"):
                    computed[key] = self._moment(*key, tokens).cpu()
        moments = {name: computed[int(name.partition(".")[0]), name.endswith(DOWN)] for name in self._names}
        return ExpertMoments(moments, sum(entered for _, entered in shares), tokens)

    def _moment(self, number: int, is_down: bool, tokens: list[int]) -> Tensor:
        everywhere = self._all[is_down][number if is_down else 0].compute()
        own = self._routed[is_down][number]
        if not own.has_weight:
            return everywhere
        return shrunk(own.compute(), everywhere, tokens[number], self._shrinkage)


@contextmanager
def naming(linear: str) -> Iterator[None]:
    """Put the name of a linear before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{linear}: {error}") from error
