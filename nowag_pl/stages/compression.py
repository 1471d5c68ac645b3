"""Compression: every selected linear of every block by its method, a block at a time."""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.objective import reconstruction_loss
from nowag_pl.models.state import held_state
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear, VQLinear
from nowag_pl.run.layout import COMPRESSED, OUTPUT_MOMENTS
from nowag_pl.run.progress import Report
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.assignment import Assignment
from nowag_pl.stages.calibration import write_moments
from nowag_pl.stages.loop import BlockStage, over_blocks
from nowag_pl.stages.moments import LinearGroup, MomentSource


class Result(NamedTuple):
    """The result of compressing one linear.

    Attributes:
        storage: its tensors, in host memory.
        description: class and settings of the compressed linear.
        statistics: JSON values for the report.
    """

    storage: dict[str, Tensor]
    description: dict[str, Any]
    statistics: dict[str, Any]

    def linear(self) -> CompressedLinear:
        """Return the compressed linear."""
        return restored(self.description, self.storage)


Results = dict[str, Result]  # by name in the block


class Compression(NamedTuple):
    """Linears that are compressed, and how.

    Attributes:
        model: dense model.
        assignment: the method of every linear.
        ranks: the processes of the run.
        report: reports the progress.
        output_moments: second moments of gradients at the outputs of a block's linears, for methods that need them.
    """

    model: StreamedModel
    assignment: Assignment
    ranks: Ranks
    report: Report
    output_moments: Mapping[str, Tensor]

    @classmethod
    def of_block(
        cls, model: StreamedModel, store: ArtefactStore, assignment: Assignment, index: int, report: Report
    ) -> "Compression":
        """Return the compression of a block; second moments of gradients are read where a method needs them."""
        outputs = store.read(OUTPUT_MOMENTS, index)[0] if assignment.output_moment else {}
        return cls(model, assignment, store.ranks, report, outputs)


def compress(model: StreamedModel, store: ArtefactStore, source: MomentSource, assignment: Assignment) -> None:
    """Write the compressed linears of every block that lacks them.

    Args:
        model: dense model.
        store: run directory.
        source: source of second moments.
        assignment: the method of every linear.

    Raises:
        ValueError: a linear cannot be compressed; the message names it.
    """

    def work(index: int, block: nn.Module, report: Report) -> str:
        order = list(model.linears(index, block))
        compression = Compression.of_block(model, store, assignment, index, report)
        results, seconds = compress_block(compression, source, block, index)
        write_moments(model, store, index, source.gathered())
        _write(store, index, order, results, seconds)
        losses = [result.statistics["loss"] for result in results.values()]
        return f"mean loss {sum(losses) / max(len(losses), 1):.4f}"

    over_blocks(model, store, source, BlockStage(COMPRESSED, "Compressing", work, partial(read_block, store)))


def compress_block(
    compression: Compression, source: MomentSource, block: nn.Module, index: int
) -> tuple[Results, float]:
    """Compress the linears of a block, group after group; return the results, and the seconds it took."""
    results: Results = {}
    seconds = 0.0
    for group in source.groups(block, index):
        started = time.perf_counter()
        made = compress_linears(compression, index, group)
        source.compressed({name: result.linear for name, result in made.items()})
        results |= made
        seconds += time.perf_counter() - started
    return results, seconds


def compress_linears(compression: Compression, index: int, group: LinearGroup) -> Results:
    """Compress some linears of a block, divided among the ranks.

    Args:
        compression: the methods.
        index: number of the block.
        group: the linears; they are taken out of it.

    Raises:
        ValueError: one of them cannot be compressed, on any rank; the message names it.
    """
    model, assignment, ranks, report, output_moments = compression
    mine = _share(group.linears, ranks)
    results: Results = {}
    problem = None
    for number, name in enumerate(mine):
        report(f"linear {number + 1} of {len(mine)}: {name}{_so_far(results)}", 0)
        linear, full_name = group.linears.pop(name), f"{model.block_name(index)}.{name}"
        try:
            method = assignment.method(full_name)
            target, moment = group.target(name, linear), group.moments[name].to(model.device)
            if method.output_moment:
                compressed = method.compress_coupled(target, moment, output_moments[name].to(model.device))
            else:
                compressed = method.compress(target, moment)
        except ValueError as error:
            # All ranks are told, so that none waits for one that has gone.
            problem = f"{full_name}: {error}"
            break
        if not isinstance(compressed, CompressedLinear):
            raise TypeError(f"Expected {method!r} to return a CompressedLinear, but got {type(compressed)}.")
        storage = {key: tensor.cpu() for key, tensor in compressed.storage().items()}
        results[name] = Result(storage, compressed.description(), measure(linear, compressed, group.moments[name]))
    for others, their_problem in ranks.gather((results, problem)):
        if their_problem is not None:
            raise ValueError(their_problem)
        results |= others
    return results


def _so_far(results: Results) -> str:
    losses = [result.statistics["loss"] for result in results.values()]
    return f", mean loss so far {sum(losses) / len(losses):.4f}" if losses else ""


def _share(linears: Mapping[str, nn.Linear], ranks: Ranks) -> list[str]:
    """Return this rank's linears: the largest first, in turn."""
    by_size = sorted(linears, key=lambda name: -linears[name].weight.numel())
    return ranks.share(by_size)


def _write(store: ArtefactStore, index: int, names: Iterable[str], results: Results, seconds: float) -> None:
    """Write the compressed linears of a block in the order of `names`."""
    store.write(
        COMPRESSED,
        index,
        {f"{name}.{key}": tensor for name in names for key, tensor in results[name].storage.items()},
        {
            "linears": {name: results[name].description for name in names},
            "statistics": {name: results[name].statistics for name in names},
            "seconds": seconds,
        },
    )


@torch.no_grad()
def measure(linear: nn.Linear, compressed: CompressedLinear, second_moment: Tensor) -> dict[str, Any]:
    """Return the entry of one compressed linear in the report.

    Args:
        linear: the dense linear `[out, in]`.
        compressed: its compressed form.
        second_moment: `[in]` or `[in, in]`.
    """
    squares = mean_squares(second_moment).to(linear.weight.device)
    statistics = {
        "shape": list(linear.weight.shape),
        "loss": reconstruction_loss(linear.weight, compressed.weight, squares),
        "bits_per_weight": compressed.bits_per_weight,
        "sparsity": compressed.sparsity,
        "bytes": compressed.storage_bytes,
    }
    if isinstance(compressed, VQLinear):
        statistics["codebook_use"] = compressed.codebook_use
    return statistics


def read_block(store: ArtefactStore, index: int) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a block by their name in it."""
    tensors, metadata = store.read(COMPRESSED, index)
    return {name: find_linear(description, tensors, name) for name, description in metadata["linears"].items()}


def find_linear(description: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> CompressedLinear:
    """Return one compressed linear of an artefact.

    Args:
        description: its description.
        tensors: those of all linears.
        name: prefix of its keys, without the dot that follows it.
    """
    prefix = f"{name}."
    stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return restored(description, stored)


def restored(description: Mapping[str, Any], stored: Mapping[str, Tensor]) -> CompressedLinear:
    """Return the compressed linear of a description and its stored tensors."""
    linear = CompressedLinear.from_description(description)
    # Assigning takes no second copy.
    linear.load_state_dict(held_state(linear, stored), assign=True)
    return linear
