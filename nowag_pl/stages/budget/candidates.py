"""The choices of a budget: all linears of a block, each compressed with several settings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from nowag_pl.compressors import Compressor
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.layout import CANDIDATES
from nowag_pl.run.progress import Report
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages.assignment import Assignment
from nowag_pl.stages.compression import Compression, Results, compress_linears, find_linear
from nowag_pl.stages.loop import BlockStage, over_blocks
from nowag_pl.stages.moments import LinearGroup, MomentSource


@dataclass(frozen=True)
class Choices:
    """The methods from which each linear gets one.

    Attributes:
        settings: the compressor itself and its candidates.
        overrides: methods that are fixed for the linears that they were given for.
        fixed: whole name of such a linear to the number of its method, counted from the first of `settings` on.
    """

    settings: Sequence[Compressor]
    overrides: Sequence[Compressor] = ()
    fixed: Mapping[str, int] | None = None

    @property
    def methods(self) -> list[Compressor]:
        """All methods by their number."""
        return [*self.settings, *self.overrides]

    def of(self, name: str) -> list[int]:
        """Return the numbers among which the linear of that whole name gets one; the first is that without a budget."""
        number = (self.fixed or {}).get(name)
        return list(range(len(self.settings))) if number is None else [number]


def write_candidates(model: StreamedModel, store: ArtefactStore, source: MomentSource, choices: Choices) -> None:
    """Compress, for every block that lacks them, every linear with every setting that fits it, by dense second moments.

    Args:
        model: dense model.
        store: run directory.
        source: source of second moments.
        choices: the settings.

    Raises:
        ValueError: a linear cannot be compressed; the message names it.
    """

    def work(index: int, block: nn.Module, report: Report) -> str:
        started = time.perf_counter()
        (group,) = source.groups(block, index)
        results = [
            compress_linears(
                Compression.of_block(model, store, Assignment([method]), index, report),
                index,
                group._replace(linears=_with_setting(model, index, group, choices, number)),
            )
            for number, method in enumerate(choices.methods)
        ]
        _write(store, index, results, time.perf_counter() - started)
        return f"{len(choices.settings)} settings"

    over_blocks(model, store, source, BlockStage(CANDIDATES, "Compressing with all settings", work))


def _with_setting(
    model: StreamedModel, index: int, group: LinearGroup, choices: Choices, number: int
) -> dict[str, nn.Linear]:
    """Return the linears that are compressed with a setting: those that may get it and that it fits.

    The setting that a linear has without a budget must fit; otherwise there is an error.
    """
    found = {}
    for name, linear in group.linears.items():
        numbers = choices.of(f"{model.block_name(index)}.{name}")
        if number == numbers[0] or (number in numbers and _fits(choices.methods[number], linear)):
            found[name] = linear
    return found


def _fits(compressor: Compressor, linear: nn.Linear) -> bool:
    """Return whether a compressor's settings fit the shape of a linear, as far as it knows."""
    try:
        compressor.empty((linear.out_features, linear.in_features), linear.weight.dtype, linear.bias is not None)
    except ValueError:
        return False
    return True


def read_candidates(store: ArtefactStore, index: int) -> dict[str, dict[int, CompressedLinear]]:
    """Return the candidates of a block by linear and number of the setting."""
    tensors, metadata = store.read(CANDIDATES, index)
    found: dict[str, dict[int, CompressedLinear]] = {}
    for number, descriptions in enumerate(metadata["linears"]):
        for name, description in descriptions.items():
            found.setdefault(name, {})[number] = find_linear(description, tensors, f"{number}.{name}")
    return found


def read_bits(store: ArtefactStore, index: int) -> dict[str, dict[int, int]]:
    """Return the stored bits of each candidate of a block."""
    found: dict[str, dict[int, int]] = {}
    for number, statistics in enumerate(store.read_metadata(CANDIDATES, index)["statistics"]):
        for name, row in statistics.items():
            bits = row["bits_per_weight"] * row["shape"][0] * row["shape"][1]
            found.setdefault(name, {})[number] = round(bits)
    return found


def _write(store: ArtefactStore, index: int, results: Sequence[Results], seconds: float) -> None:
    store.write(
        CANDIDATES,
        index,
        {
            f"{number}.{name}.{key}": tensor
            for number, by_name in enumerate(results)
            for name, result in by_name.items()
            for key, tensor in result.storage.items()
        },
        {
            "linears": [{name: result.description for name, result in each.items()} for each in results],
            "statistics": [{name: result.statistics for name, result in each.items()} for each in results],
            "seconds": seconds,
        },
    )
