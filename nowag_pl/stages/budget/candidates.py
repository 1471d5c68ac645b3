"""All linears of a block, each compressed with several settings: what a budget chooses from."""

import time
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nowag_pl.compressors import Compressor
from nowag_pl.models.streaming import StreamedModel
from nowag_pl.modules import CompressedLinear
from nowag_pl.run.progress import Report, block_progress
from nowag_pl.run.store import ArtefactStore
from nowag_pl.stages import calibration
from nowag_pl.stages.compression import Results, compress_linears, find_linear, take_linears
from nowag_pl.stages.hidden import HiddenStream

STAGE = "budget/candidates"


def write_candidates(
    model: StreamedModel, settings: Sequence[Compressor], store: ArtefactStore, stream: HiddenStream | None
) -> None:
    """Compress, for every block that lacks them, every linear with every setting that fits it, by dense second moments.

    Args:
        model: dense model.
        settings: the compressor itself and its candidates.
        store: run directory, with the mean squares of every block unless `stream` is given.
        stream: calibration sequences in front of block 0, to gather second moments.

    Raises:
        ValueError: a linear cannot be compressed; the message names it.
    """
    missing = store.missing(STAGE, len(model))
    last = max(missing, default=-1)
    full = any(setting.full_second_moment for setting in settings)
    with block_progress("Compressing with all settings", last + 1, store.ranks.is_zero, model.device) as report:
        for index in range(last + 1):
            if index in missing:
                block = model.load_block(index)
                started = time.perf_counter()
                if stream is None:
                    moments = store.read(calibration.STAGE, index)[0]
                else:
                    moments, _ = calibration.gather(model, stream, block, index, store.ranks, advance=True, full=full)
                results = _compress(model, block, index, settings, moments, store, report)
                _write(store, index, results, time.perf_counter() - started)
            elif stream is not None:
                stream.run(model.load_block(index), index)
            report(f"{len(settings)} settings" if index in missing else "already there")


def _compress(
    model: StreamedModel,
    block: nn.Module,
    index: int,
    settings: Sequence[Compressor],
    moments: Mapping[str, Tensor],
    store: ArtefactStore,
    report: Report,
) -> list[Results]:
    """Compress the linears of one block, which it loses, with every setting that fits them."""
    linears = take_linears(block)
    return [
        compress_linears(
            model,
            index,
            {name: linear for name, linear in linears.items() if number == 0 or _fits(setting, linear)},
            setting,
            moments,
            store.ranks,
            report,
        )
        for number, setting in enumerate(settings)
    ]


def _fits(compressor: Compressor, linear: nn.Linear) -> bool:
    """Tell whether a compressor's settings fit the shape of a linear, as far as it can say."""
    try:
        compressor.empty((linear.out_features, linear.in_features), linear.weight.dtype)
    except ValueError:
        return False
    return True


def read_candidates(store: ArtefactStore, index: int) -> dict[str, dict[int, CompressedLinear]]:
    """Return the candidates of a block by linear and number of the setting."""
    tensors, metadata = store.read(STAGE, index)
    found: dict[str, dict[int, CompressedLinear]] = {}
    for number, descriptions in enumerate(metadata["linears"]):
        for name, description in descriptions.items():
            found.setdefault(name, {})[number] = find_linear(description, tensors, f"{number}.{name}")
    return found


def read_bits(store: ArtefactStore, index: int) -> dict[str, dict[int, int]]:
    """Return the stored bits of each candidate of a block."""
    found: dict[str, dict[int, int]] = {}
    for number, statistics in enumerate(store.read_metadata(STAGE, index)["statistics"]):
        for name, row in statistics.items():
            bits = row["bits_per_weight"] * row["shape"][0] * row["shape"][1]
            found.setdefault(name, {})[number] = round(bits)
    return found


def _write(store: ArtefactStore, index: int, results: Sequence[Results], seconds: float) -> None:
    store.write(
        STAGE,
        index,
        {
            f"{number}.{name}.{key}": tensor
            for number, by_name in enumerate(results)
            for name, (storage, _, _) in by_name.items()
            for key, tensor in storage.items()
        },
        {
            "linears": [{name: description for name, (_, description, _) in each.items()} for each in results],
            "statistics": [{name: statistics for name, (_, _, statistics) in each.items()} for each in results],
            "seconds": seconds,
        },
    )
