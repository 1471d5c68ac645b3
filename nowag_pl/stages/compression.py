"""Compression: every linear of every block by one method, a block at a time."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.compressors import Compressor
from nowag_pl.compressors.budget import Allocation
from nowag_pl.functional.correction import corrected_weight
from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.objective import reconstruction_loss
from nowag_pl.models.checkpoint import set_module
from nowag_pl.models.streaming import StreamedModel, find_linears
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.progress import Report, block_progress
from nowag_pl.run.ranks import Ranks
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import calibration
from nowag_pl.stages.calibration import CalibrationMode
from nowag_pl.stages.correction import Drift, find_groups, gather_drift
from nowag_pl.stages.hidden import HiddenStream

STAGE = "compressed"
Results = dict[str, tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]]  # storage, description, statistics


def compress(
    model: StreamedModel,
    compressor: Compressor | Allocation,
    store: ArtefactStore,
    stream: HiddenStream | None = None,
    mode: CalibrationMode = "propagated",
) -> None:
    """Write the compressed linears of every block that lacks them.

    Args:
        model: dense model.
        compressor: what is done with each linear, or an allocation, which says it for each of them.
        store: run directory, with the second moments of every block unless `stream` is given.
        stream: calibration sequences in front of block 0, to gather second moments anew, full ones if the compressor
            needs them.
        mode: with a stream, which second moments: "dense", those of the dense model; "propagated", those behind the
            compressed blocks before; "corrected", those behind the compressed linears before, with every linear fitted
            to what the dense one gave.

    Raises:
        ValueError: a linear cannot be compressed; the message names it.
    """
    missing = set(store.missing(STAGE, len(model)))
    if not missing:
        return
    last = max(missing)
    dense_stream = stream.fork() if stream is not None and mode == "corrected" else None
    with block_progress("Compressing", last + 1, store.ranks.is_zero, model.device) as report:
        for index in range(last + 1):
            if index not in missing and stream is None:
                report("already there")
                continue
            is_missing = index in missing
            if stream is not None and dense_stream is not None:
                streams = (dense_stream, stream)
                losses = _process_corrected(model, index, compressor, store, streams, is_missing, report)
            elif stream is not None and mode == "dense":
                losses = _process_dense(model, index, compressor, store, stream, is_missing, report)
            else:
                losses = _process_block(model, index, compressor, store, stream, is_missing, report)
            report(f"mean loss {sum(losses) / max(len(losses), 1):.4f}")


def _process_block(
    model: StreamedModel,
    index: int,
    compressor: Compressor | Allocation,
    store: ArtefactStore,
    stream: HiddenStream | None,
    is_missing: bool,
    report: Report,
) -> list[float]:
    """Compress a block if it is missing, move the stream behind it, and return the losses of its linears."""
    block = model.load_block(index)
    if is_missing:
        if stream is None:
            moments, _ = store.read(calibration.STAGE, index)
        else:
            full = compressor.full_second_moment
            moments = calibration.calibrate_block(model, stream, block, index, store, advance=False, full=full)
        _compress_block(model, block, index, compressor, moments, store, report)
    if stream is not None:
        _run_compressed(model, block, index, store, stream)
    return _losses(store, index)


def _process_dense(
    model: StreamedModel,
    index: int,
    compressor: Compressor | Allocation,
    store: ArtefactStore,
    stream: HiddenStream,
    is_missing: bool,
    report: Report,
) -> list[float]:
    """Compress a block, if it is missing, by the full second moments of its dense inputs; as :func:`_process_block`."""
    block = model.load_block(index)
    if is_missing:
        moments, _ = calibration.gather(model, stream, block, index, store.ranks, advance=True, full=True)
        _compress_block(model, block, index, compressor, moments, store, report)
    else:
        stream.run(block, index)
    return _losses(store, index)


def _process_corrected(
    model: StreamedModel,
    index: int,
    compressor: Compressor | Allocation,
    store: ArtefactStore,
    streams: tuple[HiddenStream, HiddenStream],
    is_missing: bool,
    report: Report,
) -> list[float]:
    """Compress a block, if it is missing, for its dense outputs, and move both streams; as :func:`_process_block`."""
    dense_stream, stream = streams
    block = model.load_block(index)
    if is_missing:
        calibration.check_finite_weights(model, block, index)
        _compress_corrected(model, block, index, compressor, store, streams, report)
    dense_stream.run(block, index)
    _run_compressed(model, block, index, store, stream)
    return _losses(store, index)


def _run_compressed(
    model: StreamedModel, block: nn.Module, index: int, store: ArtefactStore, stream: HiddenStream
) -> None:
    """Put the compressed linears into a block, and move the stream behind it."""
    for name, linear in read_block(store, index).items():
        set_module(block, name, linear.to(model.device))
    stream.run(block, index)


def _compress_corrected(
    model: StreamedModel,
    dense: nn.Module,
    index: int,
    compressor: Compressor | Allocation,
    store: ArtefactStore,
    streams: tuple[HiddenStream, HiddenStream],
    report: Report,
) -> None:
    """Compress the linears of one block, those with the same input together, behind those before; write them."""
    block = copy.deepcopy(dense, {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())})
    results: Results = {}
    squares: dict[str, Tensor] = {}
    calibrating = compressing = 0.0
    dense_linears = find_linears(dense)
    for group in find_groups(model, dense, index):
        started = time.perf_counter()
        drift = gather_drift(model, index, (dense, block), streams, group, store.ranks)
        gathered = time.perf_counter()
        squares |= {name: mean_squares(drift.second_moment).clone() for name in group}
        full = compressor.full_second_moment
        moments = dict.fromkeys(group, drift.second_moment if full else mean_squares(drift.second_moment))

        def correct(name: str, linear: nn.Linear, drift: Drift = drift) -> nn.Linear:
            weight = corrected_weight(linear.weight, drift.drifts[name], drift.second_moment)
            parameter = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
            return copy.deepcopy(linear, {id(linear.weight): parameter})

        linears = {name: dense_linears[name] for name in group}
        results |= compress_linears(model, index, linears, compressor, moments, store.ranks, report, correct)
        for name in group:
            storage, description, _ = results[name]
            set_module(block, name, restored(description, storage).to(model.device))
        calibrating += gathered - started
        compressing += time.perf_counter() - gathered
    calibration.write_moments(model, index, store, squares, drift.num_tokens, calibrating)
    _write(store, index, dense_linears, results, compressing)


def _losses(store: ArtefactStore, index: int) -> list[float]:
    return [row["loss"] for row in store.read_metadata(STAGE, index)["statistics"].values()]


def _compress_block(
    model: StreamedModel,
    block: nn.Module,
    index: int,
    compressor: Compressor | Allocation,
    moments: Mapping[str, Tensor],
    store: ArtefactStore,
    report: Report,
) -> None:
    """Compress the linears of one block, which it loses, and write them as one artefact."""
    started = time.perf_counter()
    linears = take_linears(block)
    names = list(linears)
    results = compress_linears(model, index, linears, compressor, moments, store.ranks, report)
    _write(store, index, names, results, time.perf_counter() - started)


def take_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a block by name, and let the block go of them."""
    linears = find_linears(block)
    for name in linears:
        set_module(block, name, nn.Identity())
    return linears


def compress_linears(
    model: StreamedModel,
    index: int,
    linears: dict[str, nn.Linear],
    compressor: Compressor | Allocation,
    moments: Mapping[str, Tensor],
    ranks: Ranks,
    report: Report,
    correct: Callable[[str, nn.Linear], nn.Linear] | None = None,
) -> Results:
    """Compress some linears of one block, shared out over the ranks.

    Args:
        model: dense model.
        index: number of the block.
        linears: by name; they are taken out.
        compressor: what is done with each, or an allocation.
        moments: second moment of each.
        ranks: the processes of the run.
        report: says how far it is.
        correct: gives what is compressed in the place of a linear. Statistics are those of the linear.

    Raises:
        ValueError: one of them cannot be compressed, on any rank; the message names it.
    """
    mine = _share(linears, ranks)
    results: Results = {}
    problem = None
    for number, name in enumerate(mine):
        losses = [statistics["loss"] for _, _, statistics in results.values()]
        so_far = f", mean loss so far {sum(losses) / len(losses):.4f}" if losses else ""
        report(f"linear {number + 1} of {len(mine)}: {name}{so_far}", 0)
        linear = linears.pop(name)
        try:
            target = linear if correct is None else correct(name, linear)
            method = compressor.of(index, name) if isinstance(compressor, Allocation) else compressor
            compressed = method.compress(target, moments[name].to(model.device))
        except ValueError as error:  # told to all ranks, so that none waits for one that has gone
            problem = f"{model.block_name(index)}.{name}: {error}"
            break
        if not isinstance(compressed, CompressedLinear):
            raise TypeError(f"Expected {method!r} to return a CompressedLinear, but got {type(compressed)}.")
        statistics = measure(linear, compressed, moments[name])
        storage = {key: tensor.cpu() for key, tensor in compressed.storage().items()}
        results[name] = (storage, compressed.description(), statistics)
    for others, their_problem in ranks.gather((results, problem)):
        if their_problem is not None:
            raise ValueError(their_problem)
        results |= others
    return results


def _write(store: ArtefactStore, index: int, names: Iterable[str], results: Results, seconds: float) -> None:
    """Write the compressed linears of a block in the order of `names`."""
    ordered = [(name, *results[name]) for name in names]
    store.write(
        STAGE,
        index,
        {f"{name}.{key}": tensor for name, storage, _, _ in ordered for key, tensor in storage.items()},
        {
            "linears": {name: description for name, _, description, _ in ordered},
            "statistics": {name: statistics for name, _, _, statistics in ordered},
            "seconds": seconds,
        },
    )


def _share(linears: Mapping[str, nn.Linear], ranks: Ranks) -> list[str]:
    """Return this rank's linears: the largest first, in turn."""
    by_size = sorted(linears, key=lambda name: -linears[name].weight.numel())
    return ranks.share(by_size)


@torch.no_grad()
def measure(linear: nn.Linear, compressed: CompressedLinear, second_moment: Tensor) -> dict[str, Any]:
    """Return what the report says of one compressed linear.

    Args:
        linear: the dense linear `[out, in]`.
        compressed: what became of it.
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
    if compressed.codebook_use is not None:
        statistics["codebook_use"] = compressed.codebook_use
    return statistics


def read_block(store: ArtefactStore, index: int) -> dict[str, CompressedLinear]:
    """Return the compressed linears of a block by their name in it."""
    tensors, metadata = store.read(STAGE, index)
    return {name: find_linear(description, tensors, name) for name, description in metadata["linears"].items()}


def find_linear(description: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> CompressedLinear:
    """Return one compressed linear of an artefact.

    Args:
        description: its description.
        tensors: those of all linears.
        name: with a dot behind it, what the keys of its own begin with.
    """
    prefix = f"{name}."
    stored = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    return restored(description, stored)


def restored(description: Mapping[str, Any], stored: Mapping[str, Tensor]) -> CompressedLinear:
    """Return the compressed linear of a description and what it stores."""
    linear = CompressedLinear.from_description(description)
    own = linear.state_dict()
    state = {key: tensor.to(own[key].dtype) if key in own else tensor for key, tensor in stored.items()}
    linear.load_state_dict(state, assign=True)  # no second copy
    return linear
