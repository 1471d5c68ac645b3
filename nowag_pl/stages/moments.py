"""Sources of the second moments of a block's linears while blocks are processed one after the other.

- :class:`StoredMoments`: from the artefacts of a calibration, mean squares of the dense model.
- :class:`DenseMoments`: gathered as the hidden states of the dense model pass.
- :class:`PropagatedMoments`: gathered as the hidden states of the compressed blocks pass.
- :class:`~nowag_pl.stages.correction.CorrectedMoments`: gathered after all linears that are compressed already.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from nowag_pl.functional.moments import mean_squares
from nowag_pl.models.experts import routed_experts
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear, SecondMoment
from nowag_pl.run.layout import MOMENTS
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.expert_moments import ObservedExperts, naming
from nowag_pl.stages.hidden import HiddenStates

TokenWeights = Callable[[int, str], Tensor]  # number of a block, name of a linear to `[num_mine, seq_len]`
Made = Callable[[int], dict[str, CompressedLinear]]  # number of a block to the replacements of its linears


class LinearGroup(NamedTuple):
    """Linears of a block that are compressed before anything after them is processed.

    Attributes:
        linears: dense linears by their name in the block.
        moments: second moment of each, `[in]` or `[in, in]`.
        target: gives the linear to compress in the place of a linear.
    """

    linears: dict[str, nn.Linear]
    moments: Mapping[str, Tensor]
    target: Callable[[str, nn.Linear], nn.Linear] = lambda _, linear: linear


class Gathered(NamedTuple):
    """The statistics that a source has gathered for a block.

    Attributes:
        squares: mean squares of the input of each linear, `[in]`.
        num_tokens: number of tokens in the means.
        seconds: time it took.
        tokens: tokens that were routed to each expert, by the name of the experts in the block.
    """

    squares: dict[str, Tensor]
    num_tokens: int
    seconds: float
    tokens: Mapping[str, list[int]] = {}


class MomentSource(ABC):
    """A source of second moments.

    Lifecycle, block by block: `groups` where the block's linears are needed, then `gathered`; then `advance`.

    Attributes:
        has_states: whether hidden states have to pass through every block, even one that needs no second moments.
    """

    has_states: ClassVar[bool] = True

    @abstractmethod
    def groups(self, block: nn.Module, index: int) -> Iterator[LinearGroup]:
        """Yield the selected linears of a block, in the order in which they are to be compressed.

        Args:
            block: the dense block, as it was loaded.
            index: its number.

        Raises:
            ValueError: a weight or an activation is NaN or infinite; the message names block and linear.
        """

    def compressed(  # noqa: B027 - most sources need not know it
        self, linears: Mapping[str, Callable[[], CompressedLinear]]
    ) -> None:
        """Receive the compressed linears of the last group, before the next one is asked for.

        Args:
            linears: gives each compressed linear, by its name in the block.
        """

    @abstractmethod
    def gathered(self) -> Gathered | None:
        """Return the statistics that were gathered for the last block, or None."""

    @abstractmethod
    def advance(self, block: nn.Module, index: int, made: Made) -> None:
        """Let the hidden states pass a block.

        Args:
            block: the block, as it was loaded, perhaps without its linears.
            index: its number.
            made: replacements of linears.
        """


class StoredMoments(MomentSource):
    """Second moments of a calibration that is done.

    Args:
        model: dense model.
        store: run directory with the second moments of every block.
    """

    has_states = False

    def __init__(self, model: StreamedModel, store: ArtefactStore) -> None:
        self._model = model
        self._store = store

    def groups(self, block: nn.Module, index: int) -> Iterator[LinearGroup]:
        """Yield all linears at once."""
        yield LinearGroup(taken(self._model, block, index), self._store.read(MOMENTS, index)[0])

    def gathered(self) -> None:
        """Nothing is gathered."""

    def advance(self, block: nn.Module, index: int, made: Made) -> None:
        """No hidden states have to pass."""


class DenseMoments(MomentSource):
    """Second moments of the inputs in the dense model.

    Args:
        model: dense model.
        states: hidden states of this rank before block 0.
        ranks: the processes of the run.
        full: whether to gather the matrices of x x^T.
        weights: weight of each token; None: equal weights.
        shrinkage: as for :class:`~nowag_pl.stages.expert_moments.ObservedExperts`.
    """

    def __init__(
        self,
        model: StreamedModel,
        states: HiddenStates,
        ranks: Ranks,
        full: bool,
        weights: TokenWeights | None = None,
        shrinkage: float = 0.0,
    ) -> None:
        self._model = model
        self._states = states
        self._ranks = ranks
        self._full = full
        self._weights = weights
        self._shrinkage = shrinkage
        self._gathered: Gathered | None = None
        self._has_passed = False

    def groups(self, block: nn.Module, index: int) -> Iterator[LinearGroup]:
        """Yield all linears at once."""
        moments = self._gather(block, index, advance=True)
        self._has_passed = True
        yield LinearGroup(taken(self._model, block, index), moments)

    def _gather(self, block: nn.Module, index: int, advance: bool) -> dict[str, Tensor]:
        started = time.perf_counter()
        check_finite_weights(self._model, block, index)
        observed = Observed(self._model, block, index, self._full, self._weights, self._shrinkage)
        with observed:
            self._states.run(block, index, advance)
        moments, num_tokens, tokens = observed.compute(self._ranks)
        # Linears may share a tensor, which a file may hold only once.
        squares = {name: mean_squares(moment).clone() for name, moment in moments.items()}
        self._gathered = Gathered(squares, num_tokens, time.perf_counter() - started, tokens)
        return moments

    def gathered(self) -> Gathered | None:
        """Return the mean squares of the last block."""
        return self._gathered

    def advance(self, block: nn.Module, index: int, made: Made) -> None:
        """Pass the dense block, unless that was done while second moments were gathered."""
        if not self._has_passed:
            self._states.run(block, index)
        self._has_passed = False


class PropagatedMoments(DenseMoments):
    """Second moments of the inputs after the blocks that are compressed already."""

    def groups(self, block: nn.Module, index: int) -> Iterator[LinearGroup]:
        """Yield all linears at once."""
        moments = self._gather(block, index, advance=False)
        yield LinearGroup(taken(self._model, block, index), moments)

    def advance(self, block: nn.Module, index: int, made: Made) -> None:
        """Pass the compressed block."""
        put(block, made(index), self._model)
        self._states.run(block, index)


def taken(model: StreamedModel, block: nn.Module, index: int) -> dict[str, nn.Linear]:
    """Return the selected linears of a block by name, and let the block go of them, so that each can be freed alone."""
    linears = model.linears(index, block)
    for name in linears:
        block.set_submodule(name, nn.Identity())
    return linears


def put(block: nn.Module, linears: Mapping[str, CompressedLinear], model: StreamedModel) -> None:
    """Put compressed linears into a block."""
    for name, linear in linears.items():
        block.set_submodule(name, linear.to(model.device))


class Observed:
    """Second moments of the inputs of a block's linears while the context is open.

    Linears that are called with the same tensor share one matrix, which is gathered for the first of them, unless each
    has its own weights of tokens.

    Args:
        model: dense model.
        block: the block.
        index: its number.
        full: whether to gather the matrices of x x^T.
        weights: weight of each token; None: equal weights.
        shrinkage: as for :class:`~nowag_pl.stages.expert_moments.ObservedExperts`.
    """

    def __init__(
        self,
        model: StreamedModel,
        block: nn.Module,
        index: int,
        full: bool,
        weights: TokenWeights | None = None,
        shrinkage: float = 0.0,
    ) -> None:
        self._title = model.block_name(index)
        selected = model.linears(index, block)
        self._order = list(selected)
        self._experts = {}
        for name, experts in routed_experts(block).items():
            if inside := [each.removeprefix(f"{name}.") for each in selected if each.startswith(f"{name}.")]:
                self._experts[name] = ObservedExperts(experts, inside, full, shrinkage)
        self._linears = {name: each for name, each in selected.items() if not name.startswith(tuple(self._within))}
        self._full = full
        self._weights = weights and {name: Weights(weights(index, name)) for name in self._linears}
        self.moments: dict[str, SecondMoment] = {}
        if not full or weights is not None:
            self.moments = {name: self._empty(name) for name in self._linears}
        # The linear that was called with the same input first, by linear.
        self._leaders: dict[str, str] = {}
        self._input: Tensor | None = None
        self._leader = ""
        self._handles: list[Callable[[], None]] = []

    @property
    def _within(self) -> list[str]:
        return [f"{name}." for name in self._experts]

    def _empty(self, name: str) -> SecondMoment:
        linear = self._linears[name]
        return SecondMoment(linear.in_features, self._full).to(linear.weight.device)

    def __enter__(self) -> None:
        for name, linear in self._linears.items():
            hook = linear.register_forward_pre_hook(lambda _, args, name=name: self.observe(name, args[0]))
            self._handles.append(hook.remove)
        for experts in self._experts.values():
            experts.attach()

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop()()
        for experts in self._experts.values():
            experts.detach()
        self._input = None

    def observe(self, name: str, activations: Tensor) -> None:
        """Add the input of a linear.

        Raises:
            RuntimeError: it shared its input with another linear in an earlier call, and does not now.
        """
        if not self._full or self._weights:
            weights = self._weights[name].of(activations) if self._weights else None
            self.moments[name].update(activations, weights)
            return
        if activations is not self._input:
            self._input, self._leader = activations, name
        if self._leaders.setdefault(name, self._leader) != self._leader:
            raise RuntimeError(f"Expected {name} to share its input with {self._leaders[name]} in every call.")
        if self._leader == name:
            if name not in self.moments:
                self.moments[name] = self._empty(name)
            self.moments[name].update(activations)

    def shared(self, ranks: Ranks) -> dict[str, SecondMoment]:
        """Return the second moments of this rank; linears with the same input have the same object.

        The ranks agree on who shares with whom, so that all of them must call.
        """
        leaders = {name: leader for shared in ranks.gather(self._leaders) for name, leader in shared.items()}
        for name in self._linears:
            # A rank without sequences has seen none.
            if leaders.get(name, name) == name and name not in self.moments:
                self.moments[name] = self._empty(name)
        return {name: self.moments[leaders.get(name, name)] for name in self._linears}

    def compute(self, ranks: Ranks) -> tuple[dict[str, Tensor], int, dict[str, list[int]]]:
        """Reduce over the ranks; all of them must call.

        Returns:
            Second moment of each linear by its name in the block, `[in]`, or `[in, in]` if full, float32 in host
            memory; the number of tokens; and those of each expert, by the name of the experts.

        Raises:
            ValueError: an activation is NaN or infinite, or a linear was never called; the message names block and
                linear.
        """
        moments = self.shared(ranks)
        # Before sums that wait without a word.
        ranks.meet()
        computed: dict[SecondMoment, Tensor] = {}
        num_tokens = 0
        for name, moment in moments.items():
            if moment not in computed:
                moment.all_reduce()
                num_tokens = int(moment.num_tokens)
                with naming(f"{self._title}.{name}"):
                    if not num_tokens:
                        raise ValueError(
                            "Expected a linear that its block calls, but no token went through it: leave it out by "
                            f"--compression.ignore=['*{name}']."
                        )
                    computed[moment] = moment.compute().cpu()
        found = {name: computed[moment] for name, moment in moments.items()}
        tokens = {}
        for name, experts in self._experts.items():
            own, entered, tokens[name] = experts.compute(ranks, f"{self._title}.{name}")
            found |= {f"{name}.{linear}": moment for linear, moment in own.items()}
            num_tokens = num_tokens or entered
        return {name: found[name] for name in self._order}, num_tokens, tokens


class Weights:
    """The weight of each token, handed out batch by batch as the sequences pass.

    Args:
        weights: of all sequences of this rank, `[num_sequences, seq_len]`.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._position = 0

    def of(self, activations: Tensor) -> Tensor:
        """Return the weights of the next sequences, `[batch, seq_len]`, for activations `[batch, seq_len, ...]`."""
        start, self._position = self._position, self._position + len(activations)
        return self._weights[start : self._position].to(activations.device)


def check_finite_weights(model: StreamedModel, block: nn.Module, index: int) -> None:
    """Raise ValueError that names the first linear of a block with a weight that is NaN or infinite."""
    for name, linear in model.linears(index, block).items():
        if not linear.weight.isfinite().all():
            raise ValueError(f"{model.block_name(index)}.{name}: Expected finite weights, but got NaN or infinity.")
