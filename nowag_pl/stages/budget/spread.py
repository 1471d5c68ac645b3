"""A budget of bits, spread over the linears of a model by measured sensitivity, and never worse than uniform."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nowag_pl.compressors.budget import Budget, titles
from nowag_pl.files import read_sealed_json, set_aside, write_sealed_json
from nowag_pl.functional.allocation import allocate
from nowag_pl.functional.chunks import position_chunks
from nowag_pl.functional.predictions.divergence import kl_divergence
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.run.layout import CANDIDATES, COMPRESSED, DECISION, GUIDANCE, MOMENTS, SENSITIVITIES, TRIALS
from nowag_pl.run.progress import block_progress
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.assignment import Assignment
from nowag_pl.stages.budget.candidates import Choices, read_bits, write_candidates
from nowag_pl.stages.budget.sensitivity import read_sensitivities, write_sensitivities
from nowag_pl.stages.calibration import moment_source
from nowag_pl.stages.compression import compress
from nowag_pl.stages.finetuned import load_compressed_block
from nowag_pl.stages.guidance import read_guidance
from nowag_pl.stages.hidden import HiddenStates
from nowag_pl.stages.moments import DenseMoments, MomentSource, StoredMoments
from nowag_pl.stages.plan import CalibrationSettings

Selection = list[dict[str, int]]  # for each block, linear to number of its setting
_log = logging.getLogger("nowag_pl")


class Budgeted(NamedTuple):
    """A model that is compressed within a budget.

    Attributes:
        model: dense model.
        choices: the methods from which each linear gets one.
        windows: calibration sequences, the same on every rank.
        calibration: how second moments are gathered.
        budget: how many of the sequences sensitivities and the comparison take, and what all linears may take.
    """

    model: StreamedModel
    choices: Choices
    windows: Tensor
    calibration: CalibrationSettings
    budget: Budget

    @property
    def bits(self) -> int | None:
        """The most that all linears may take, where that is asked for."""
        average = self.budget.bits_per_weight
        if average is None:
            return None
        linears = (each for index in range(len(self.model)) for each in self.model.linears(index).values())
        return int(average * sum(linear.in_features * linear.out_features for linear in linears))

    def compress(self, selection: Selection, store: ArtefactStore) -> None:
        """Compress every linear with its setting into a run directory."""
        names = (self.model.block_name(index) for index in range(len(self.model)))
        numbers = {
            f"{block}.{name}": number
            for block, chosen in zip(names, selection, strict=True)
            for name, number in chosen.items()
        }
        assignment = Assignment(self.choices.methods, numbers)
        settings, full = self.calibration, assignment.full_second_moment
        source = moment_source(self.model, store, COMPRESSED, self.windows, settings, full)
        compress(self.model, store, source, assignment)


def compress_within_budget(budgeted: Budgeted, store: ArtefactStore) -> None:
    """Write the compressed linears of every block that lacks them, each with the setting that the budget gives it.

    Every linear is compressed with every setting, by the dense second moments; sensitivities say what each of them
    costs, and bits are spread so that the sum is small: together at most those of the first setting everywhere, or as
    many as are asked for. Then the whole model is compressed both ways, and that with the smaller divergence from the
    dense model's predictions is taken; never one with more bits than asked for.

    Args:
        budgeted: the model, and its choices.
        store: run directory; with calibration.mode "dense", it has the mean squares of every block.

    Raises:
        ValueError: a linear cannot be compressed; the message names it.
    """
    if store.missing(COMPRESSED, len(budgeted.model)):
        decision = read_decision(store)
        if decision is None:
            decision = _decide(budgeted, store)
        # One way was moved into the run directory as it was compared, perhaps not all of it.
        budgeted.compress(decision["selection"], store)
    # A process may have been killed after the last block.
    for stage in (CANDIDATES, TRIALS):
        store.remove(stage)


def _decide(budgeted: Budgeted, store: ArtefactStore) -> dict[str, Any]:
    """Compress both ways, compare, and put the better one into the run directory; return what was decided."""
    model, choices, windows, calibration, budget = budgeted
    full = any(method.full_second_moment for method in choices.methods)
    has_stored = calibration.mode == "dense" and not full
    write_candidates(model, store, _dense_source(budgeted, store, full, has_stored), choices)
    measured_on = windows[: budget.num_sequences]
    write_sensitivities(model, measured_on, store, calibration.batch_size)
    selections, figures = spread_bits(store, len(model), budgeted.bits)
    trials = {name: _trial(store, name, has_stored) for name in selections}
    for name, selection in selections.items():
        if store.ranks.is_zero:
            _log.info("All linears, %s settings:", name)
        budgeted.compress(selection, trials[name])
    measured = divergences(model, list(trials.values()), measured_on, calibration.batch_size)
    for name, divergence in zip(selections, measured, strict=True):
        figures[name]["divergence"] = divergence
    decision = _decision(choices, selections, figures, budgeted.bits)
    rejected = next(trial for name, trial in trials.items() if name != decision["taken"])
    decision["seconds"] = sum(
        each.read_metadata(stage, index)["seconds"]
        for each, stage in ((store, CANDIDATES), (store, SENSITIVITIES), (rejected, COMPRESSED))
        for index in range(len(model))
    )
    _log_decision(decision, store)
    if store.ranks.is_zero:
        write_sealed_json(store.folder / DECISION, decision)
        _move(trials[decision["taken"]], store, len(model))
    store.ranks.broadcast(None)
    return decision


def _dense_source(budgeted: Budgeted, store: ArtefactStore, full: bool, has_stored: bool) -> MomentSource:
    """Return dense second moments for the candidates: those in the store, or newly gathered ones."""
    model = budgeted.model
    if has_stored or not store.missing(CANDIDATES, len(model)):
        return StoredMoments(model, store)
    states = HiddenStates(model, store.ranks.share(budgeted.windows), budgeted.calibration.batch_size)
    settings = budgeted.calibration
    weights = read_guidance(store, settings.guidance)
    return DenseMoments(model, states, store.ranks, full, weights, settings.expert_shrinkage)


def _trial(store: ArtefactStore, name: str, has_stored: bool) -> ArtefactStore:
    """Return a folder for the whole model compressed in one way, with the results of calibration in it."""
    trial = ArtefactStore(store.folder / TRIALS / name, store.ranks)
    for stage in (MOMENTS, GUIDANCE) if store.ranks.is_zero else ():
        if (stage == GUIDANCE or has_stored) and (store.folder / stage).is_dir():
            shutil.copytree(store.folder / stage, trial.folder / stage, dirs_exist_ok=True)
    store.ranks.broadcast(None)
    return trial


def _move(trial: ArtefactStore, store: ArtefactStore, num_blocks: int) -> None:
    """Move the artefacts of a trial into the run directory."""
    for stage in (MOMENTS, COMPRESSED):
        (store.folder / stage).mkdir(exist_ok=True)
        for index in range(num_blocks):
            trial.path(stage, index).replace(store.path(stage, index))


def read_decision(store: ArtefactStore) -> dict[str, Any] | None:
    """Return the budget's decision, the same on every rank, or None before it; a damaged one is set aside."""
    path, decision = store.folder / DECISION, None
    if store.ranks.is_zero and path.is_file():
        try:
            decision = read_sealed_json(path)
        except ValueError:
            _log.warning("%s is damaged: it is kept as %s and made anew.", path, set_aside(path).name)
    return store.ranks.broadcast(decision)


def divergences(model: StreamedModel, stores: Sequence[ArtefactStore], windows: Tensor, batch_size: int) -> list[float]:
    """Return the mean KL divergence per token from the dense model of each of some compressed models, in nats.

    Args:
        model: dense model.
        stores: each holds the compressed linears of every block.
        windows: sequences `[num_sequences, seq_len]`, the same on every rank.
        batch_size: sequences that pass through a block together.
    """
    ranks = stores[0].ranks
    dense = HiddenStates(model, ranks.share(windows), batch_size)
    streams = [dense.fork() for _ in stores]
    with block_progress("Comparing with uniform", len(model), ranks.is_zero, model.device) as report:
        for index in range(len(model)):
            dense.run(model.load_block(index), index)
            for store, stream in zip(stores, streams, strict=True):
                stream.run(load_compressed_block(model, store, index).to(model.device), index)
            report("")
    sums = [
        sum(_divergence(model, *pair) for pair in zip(dense.batches(), stream.batches(), strict=True))
        for stream in streams
    ]
    num_predictions = len(windows) * (windows.shape[1] - 1)
    return [sum(each) / num_predictions for each in zip(*ranks.gather(sums), strict=True)]


def _divergence(model: StreamedModel, reference: Tensor, hidden: Tensor) -> float:
    """Return the summed divergence of a batch from its hidden states after the last block, without last positions."""
    total = 0.0
    for positions in position_chunks(len(hidden), hidden.shape[1] - 1, model.checkpoint.vocab_size):
        expected, actual = (model.head(each[:, positions]).flatten(0, 1) for each in (reference, hidden))
        total += float(kl_divergence(expected, actual)[0])
    return total


def spread_bits(
    store: ArtefactStore, num_blocks: int, budget: int | None = None
) -> tuple[dict[str, Selection], dict[str, dict[str, Any]]]:
    """Return the first setting everywhere and the spread bits, "uniform" and "spread", and what is known of both.

    Args:
        store: run directory with candidates and sensitivities of every block.
        num_blocks: how many there are.
        budget: bits of all linears together; None: those of the first setting.

    Returns:
        Two selections; and for each the bits of all linears, and the predicted divergence, in nats per token.
    """
    bits = [read_bits(store, index) for index in range(num_blocks)]
    losses = [read_sensitivities(store, index) for index in range(num_blocks)]
    uniform: Selection = [{name: min(by_number) for name, by_number in block.items()} for block in bits]
    selections = {"uniform": uniform, "spread": _spread(bits, losses, budget or _total(bits, uniform))}
    figures = {
        name: {"bits": _total(bits, selection), "predicted": _total(losses, selection)}
        for name, selection in selections.items()
    }
    return selections, figures


def _decision(
    choices: Choices,
    selections: Mapping[str, Selection],
    figures: Mapping[str, dict[str, Any]],
    budget: int | None,
) -> dict[str, Any]:
    """Return what is taken, and why, as JSON values."""
    is_better = figures["spread"]["divergence"] < figures["uniform"]["divergence"]
    is_too_large = budget is not None and figures["uniform"]["bits"] > budget
    taken = "spread" if is_better or is_too_large else "uniform"
    return {"settings": titles(choices.methods), "taken": taken, **figures, "selection": selections[taken]}


def _log_decision(decision: Mapping[str, Any], store: ArtefactStore) -> None:
    if store.ranks.is_zero:
        _log.info(
            "Budget: KL divergence on calibration text %.4f nats with bits spread over linears, "
            "%.4f with %s everywhere; %s taken",
            decision["spread"]["divergence"],
            decision["uniform"]["divergence"],
            decision["settings"][0],
            decision["taken"],
        )


def _spread(
    bits: Sequence[Mapping[str, Mapping[int, int]]], losses: Sequence[Mapping[str, Mapping[int, float]]], budget: int
) -> Selection:
    """Return the selection with a small sum of losses within the budget."""
    places = [(index, name) for index, block in enumerate(bits) for name in block]
    numbers = [list(bits[index][name]) for index, name in places]
    choices = [
        [(bits[index][name][number], losses[index][name][number]) for number in own]
        for (index, name), own in zip(places, numbers, strict=True)
    ]
    selection: Selection = [{} for _ in bits]
    for (index, name), own, choice in zip(places, numbers, allocate(choices, budget), strict=True):
        selection[index][name] = own[choice]
    return selection


def _total(values: Sequence[Mapping[str, Mapping[int, Any]]], selection: Selection) -> Any:
    """Add up the values of a selection."""
    return sum(
        block[name][number] for block, chosen in zip(values, selection, strict=True) for name, number in chosen.items()
    )
