"""The effect of earlier compression on a linear's input and target, measured on the streams of both models.

A linear of the compressed model receives x~ instead of the dense model's x. Its target is a tensor of the dense block:
the sum that the linear's output is added to (the residual stream) if the block passes this sum on unchanged, otherwise
the linear's own output. The target, and the linears that share their input, are found by observing one run of the
block, so that any family of models works.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nowag_pl.functional.correction import corrected_weight
from nowag_pl.functional.moments import mean_squares
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear, CrossMoment, SecondMoment
from nowag_pl.run.ranks import Ranks
from nowag_pl.stages.hidden import HiddenStates, forward
from nowag_pl.stages.moments import (
    Gathered,
    LinearGroup,
    Made,
    MomentSource,
    TokenWeights,
    Weights,
    check_finite_weights,
    naming,
    put,
)

SAMPLE_TOKENS = 16


class Point(NamedTuple):
    """The first input, or the output, of a module of a block; "" is the block."""

    module: str
    side: Literal["input", "output"]


Group = dict[str, Point]  # linears that share their input, and where their targets are


class Drift(NamedTuple):
    """Moments of the linears of a group.

    Attributes:
        second_moments: mean of `x~ x~^T`, `[in, in]`, of each linear; the same one for all if token weights are equal.
        drifts: mean of `(y - y~) x~^T` of each linear, `[out, in]`; y its target, y~ its present value before the
            linear is compressed.
        num_tokens: number of tokens in the means.
    """

    second_moments: dict[str, Tensor]
    drifts: dict[str, Tensor]
    num_tokens: int

    def corrected(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return the linear that comes nearest to its target on its present inputs."""
        weight = corrected_weight(linear.weight, self.drifts[name], self.second_moments[name])
        parameter = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        return copy.deepcopy(linear, {id(linear.weight): parameter})


class CorrectedMoments(MomentSource):
    """Second moments of the inputs after all linears that are compressed already, each fitted to its dense target.

    Args:
        model: dense model.
        states: hidden states of this rank before block 0.
        ranks: the processes of the run.
        full: whether compressors need the matrices of x x^T; they are gathered either way.
        weights: weight of each token; None: equal weights.
    """

    def __init__(
        self, model: StreamedModel, states: HiddenStates, ranks: Ranks, full: bool, weights: TokenWeights | None = None
    ) -> None:
        self._weights = weights
        self._model = model
        self._dense_states = states.fork()
        self._states = states
        self._ranks = ranks
        self._full = full
        self._block: nn.Module | None = None
        self._gathered: Gathered | None = None

    def groups(self, block: nn.Module, index: int) -> Iterator[LinearGroup]:
        """Yield the linears that share an input together, in the order in which they are called."""
        check_finite_weights(self._model, block, index)
        # Linears are replaced in a copy of the block that shares all of its tensors.
        self._block = copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})
        linears = self._model.linears(index, block)
        squares: dict[str, Tensor] = {}
        seconds = 0.0
        for group in find_groups(self._model, block, index):
            started = time.perf_counter()
            drift = self._gather(block, index, group)
            squares |= {name: mean_squares(moment).clone() for name, moment in drift.second_moments.items()}
            seconds += time.perf_counter() - started
            self._gathered = Gathered(squares, drift.num_tokens, seconds)
            moments = drift.second_moments
            if not self._full:
                moments = {name: mean_squares(moment) for name, moment in moments.items()}
            yield LinearGroup({name: linears[name] for name in group}, moments, drift.corrected)
        self._block = None

    def _gather(self, block: nn.Module, index: int, group: Group) -> "Drift":
        assert self._block is not None
        blocks = BlockPair(self._model, index, block, self._block)
        weights = self._weights and {name: self._weights(index, name) for name in group}
        return gather_drift(blocks, (self._dense_states, self._states), group, self._ranks, weights)

    def compressed(self, linears: Mapping[str, Callable[[], CompressedLinear]]) -> None:
        """Put the compressed linears of a group in the way of everything that follows them."""
        assert self._block is not None
        put(self._block, {name: make() for name, make in linears.items()}, self._model)

    def gathered(self) -> Gathered | None:
        """Return the mean squares of the last block."""
        return self._gathered

    def advance(self, block: nn.Module, index: int, made: Made) -> None:
        """Pass the dense block, and the compressed one."""
        self._dense_states.run(block, index)
        put(block, made(index), self._model)
        self._states.run(block, index)


class BlockPair(NamedTuple):
    """A block twice.

    Attributes:
        model: the dense model.
        number: its number.
        dense: the dense block.
        compressed: the same with some of its linears compressed.
    """

    model: StreamedModel
    number: int
    dense: nn.Module
    compressed: nn.Module


def find_groups(model: StreamedModel, block: nn.Module, index: int) -> list[Group]:
    """Return the selected linears of a block, grouped by shared input, in the order in which they are called.

    Args:
        model: the model of the block.
        block: the dense block.
        index: its number.

    Raises:
        ValueError: a linear is not called.
    """
    linears = model.linears(index, block)
    points = [Point(name, "input") for name, _ in block.named_modules()]
    points += [Point(name, "output") for name in ("", *linears)]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, SAMPLE_TOKENS, model.hidden_size, generator=generator).to(model.checkpoint.dtype)
    with captured(block, points) as seen, torch.no_grad():
        model.forward_block(block, hidden.to(model.device), model.arguments(index, 1, SAMPLE_TOKENS))
    groups: dict[int, Group] = {}
    for point, tensor in seen.items():
        if point.side == "input" and point.module in linears:
            groups.setdefault(id(tensor), {})[point.module] = _target(Point(point.module, "output"), seen)
    uncalled = linears.keys() - {name for group in groups.values() for name in group}
    if uncalled:
        raise ValueError(
            f"Expected {model.block_name(index)} to call all of its linears, but it does not call "
            f"{', '.join(sorted(uncalled))}: calibration.mode=corrected does not work for this model."
        )
    return list(groups.values())


def _target(own: Point, seen: Mapping[Point, Tensor]) -> Point:
    """Return the point at which an output is added to an input of another module, or the output itself."""
    order = list(seen)
    before, after = order[: order.index(own)], order[order.index(own) + 1 :]
    output = seen[own]
    sums = [output + seen[point] for point in before if point.side == "input" and seen[point].shape == output.shape]
    return next((point for point in after if any(torch.equal(seen[point], total) for total in sums)), own)


@torch.no_grad()
def gather_drift(
    blocks: BlockPair,
    states: tuple[HiddenStates, HiddenStates],
    group: Group,
    ranks: Ranks,
    weights: Mapping[str, Tensor] | None = None,
) -> Drift:
    """Gather and reduce the moments of a group.

    Args:
        blocks: the dense block, and the one whose linears are compressed up to the group.
        states: hidden states of this rank before either, possibly none; they stay there.
        group: the linears.
        ranks: the processes of the run.
        weights: weight of each token of this rank for each linear, `[num_mine, seq_len]`; None: equal weights.

    Returns:
        Float32, on the device.

    Raises:
        ValueError: an activation is NaN or infinite; the message names a linear.
    """
    model, index = blocks.model, blocks.number
    linears, leader = model.linears(index, blocks.dense), next(iter(group))
    # Linears of a group share their input, and the matrix of it where tokens count alike.
    own = list(group) if weights else [leader]
    moments = {name: SecondMoment(linears[name].in_features, full=True).to(model.device) for name in own}
    crosses = {
        name: CrossMoment(linears[name].out_features, linears[name].in_features).to(model.device) for name in group
    }
    counted = {name: Weights(weights[name]) for name in group} if weights else {}
    source, targets = Point(leader, "input"), list(group.values())
    for dense_hidden, hidden in zip(*(each.batches() for each in states), strict=True):
        with captured(blocks.dense, targets, stop=True) as dense:
            forward(model, blocks.dense, index, dense_hidden)
        with captured(blocks.compressed, [source, *targets], stop=True) as compressed:
            forward(model, blocks.compressed, index, hidden)
        inputs = compressed[source]
        of_tokens = {name: each.of(inputs) for name, each in counted.items()}
        for name, moment in moments.items():
            moment.update(inputs, of_tokens.get(name))
        for name, target in group.items():
            difference = dense[target].float() - compressed[target].float()
            crosses[name].update(difference, inputs, of_tokens.get(name))
    for each in (*moments.values(), *crosses.values()):
        each.all_reduce()
    with naming(f"{model.block_name(index)}.{leader}"):
        computed = {name: moment.compute() for name, moment in moments.items()}
    second_moments = {name: computed.get(name, computed[leader]) for name in group}
    drifts = {name: cross.compute() for name, cross in crosses.items()}
    return Drift(second_moments, drifts, int(moments[leader].num_tokens))


class _Captured(Exception):  # noqa: N818 - no error
    """All that was asked for has been seen."""


@contextmanager
def captured(block: nn.Module, points: list[Point], stop: bool = False) -> Iterator[dict[Point, Tensor]]:
    """Keep the tensors at some points of a block while the context is open, in the order in which they come.

    Args:
        block: the block.
        points: the inputs to keep; those that are not tensors, or are given by name, are left out.
        stop: leave the context as soon as all are there.
    """
    seen: dict[Point, Tensor] = {}

    def keep(point: Point, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, Tensor):
            seen[point] = value
        if stop and len(seen) == len(set(points)):
            raise _Captured

    handles = []
    for point in points:
        module = block.get_submodule(point.module)
        if point.side == "input":
            handles.append(module.register_forward_pre_hook(lambda _, args, point=point: keep(point, args)))
        else:
            handles.append(module.register_forward_hook(lambda _, args, output, point=point: keep(point, output)))
    try:
        yield seen
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
