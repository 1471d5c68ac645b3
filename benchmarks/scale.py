"""What does a run take for a model of 7, 70 or 405 billion weights, or a mixture of 235, on 1, 8 or 64 GPUs?

python -m benchmarks.scale [--models 7B 70B 405B 235B] [--gpus 1 8 64] [--method 2:4] [--rates FILE]
python -m benchmarks.scale --check        the same lines for a small model, beside its measured run on this machine

For every stage: device memory of a process, host memory of a machine of eight GPUs, disk, bytes that a device receives
over the network, and time. Memory and disk are those of `nowag_pl/needs.py`; time is that of the work at the given
rates, without waiting. Rates are assumptions for an H100 until `scripts/on_gpu.sh` has run on one; --rates takes a JSON
file of others.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.memory import METHODS, Resident
from benchmarks.results import RESULTS, hardware
from nowag_pl import NoWagPruner, NoWagQuantizer, NoWagTrellis
from nowag_pl.compressors import Compressor
from nowag_pl.files import write_json
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.needs import DataShape, StageNeeds, Training, stages_of_fit
from nowag_pl.reports.needs_table import LIBRARY_BYTES
from nowag_pl.run.wording import readable
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import (
    CalibrationSettings,
    CompressionSettings,
    ExportSettings,
    FinetuningSettings,
    Plan,
    ReportSettings,
)
from nowag_pl.stages.sizes import Holding, LinearSizes, ModelSizes, methods_of

GPUS_PER_MACHINE = 8
MATMUL_STEP = 6  # operations of a weight and token in a step: forward, and gradients of both factors
METHODS_OF_PLAN: dict[str, Compressor] = {
    "2:4": NoWagPruner(pattern=(2, 4)),
    "vq": NoWagQuantizer(subvector_dim=7, codebook_size=16384),
    "trellis": NoWagTrellis(bits=2),
}


class Shape(NamedTuple):
    """The sizes of a model.

    Attributes:
        num_blocks: decoder blocks.
        hidden: length of a hidden state.
        queries: outputs of all query heads.
        keys: outputs of all key heads.
        widest: hidden size of the MLP, or of an expert.
        vocabulary: number of token ids.
        experts: experts of a block; 1 for a plain MLP.
        active: experts that a token passes.
    """

    num_blocks: int
    hidden: int
    queries: int
    keys: int
    widest: int
    vocabulary: int
    experts: int = 1
    active: int = 1

    def linears(self, experts: int) -> list[tuple[tuple[int, int], int]]:
        """Return the shapes `(out, in)` of a block's linears with so many experts, and the number of each."""
        attention = [((self.queries, self.hidden), 1), ((self.keys, self.hidden), 2), ((self.hidden, self.queries), 1)]
        mlp = [((self.widest, self.hidden), 2 * experts), ((self.hidden, self.widest), experts)]
        return [*attention, *mlp]

    def weights(self, experts: int) -> int:
        """Return the weights of a block with so many experts."""
        return sum(shape[0] * shape[1] * count for shape, count in self.linears(experts))


SHAPES = {
    "7B": Shape(32, 4096, 4096, 4096, 11008, 32000),
    "70B": Shape(80, 8192, 8192, 1024, 28672, 32000),
    "405B": Shape(126, 16384, 16384, 1024, 53248, 128256),
    "235B": Shape(94, 4096, 8192, 512, 1536, 151936, experts=128, active=8),
}


@dataclass(frozen=True)
class Rates:
    """How fast things go.

    Attributes:
        operations: floating-point operations a second of one device, in matrix products as they come.
        weights: weights compressed a second by one device.
        disk: bytes a second of a machine from its disk, or to it.
        network: bytes a second that a device receives.
        source: where the figures come from.
    """

    operations: float = 4e14
    weights: float = 2e7
    disk: float = 2e9
    network: float = 2.5e10
    source: str = "assumed for an H100; not measured"


class Line(NamedTuple):
    """One stage of a plan."""

    needs: StageNeeds
    host: int
    network: int
    seconds: float


class Work(NamedTuple):
    """The amount of text of a run.

    Attributes:
        seq_len: tokens in a sequence.
        calibration: sequences.
        evaluation: windows.
        steps: steps of a training end to end; 0 for none.
        batch_size: windows of a step on each device.
        epochs: of blockwise finetuning.
    """

    seq_len: int = 4096
    calibration: int = 128
    evaluation: int = 600
    steps: int = 200
    batch_size: int = 1
    epochs: int = 5


_WORK = Work()


def sizes_of(shape: Shape, method: Compressor, itemsize: int = 2) -> ModelSizes:
    """Return the sizes of a model whose blocks are compressed by a method."""
    counted = []
    for (out, into), count in shape.linears(shape.experts):
        with torch.device("meta"):
            linear = nn.Linear(into, out, bias=False, dtype=torch.bfloat16 if itemsize == 2 else torch.float32)
        sizes = LinearSizes.of(linear, [method], itemsize)
        sizes = sizes._replace(pairs=into**2 * method.full_second_moment)
        counted.append((sizes, count))
    block = LinearSizes(*(sum(count * each[key] for each, count in counted) for key in range(len(LinearSizes._fields))))
    # Norms, and the router of a mixture.
    others = itemsize * shape.hidden * (2 + (shape.experts if shape.experts > 1 else 0))
    return ModelSizes(
        num_blocks=shape.num_blocks,
        hidden=shape.hidden,
        widest=max(max(linear) for linear, _ in shape.linears(1)),
        vocabulary=shape.vocabulary,
        itemsize=itemsize,
        skeleton=itemsize * shape.hidden * (2 * shape.vocabulary + 1),
        others=others * shape.num_blocks,
        dense_block=itemsize * block.weights + others,
        compressed_block=block.held + others,
        block_values=block.values + others // itemsize,
        total=LinearSizes(*(shape.num_blocks * each for each in block)),
        block=block,
        linear=LinearSizes.largest(sizes for sizes, _ in counted),
        is_compressed_here=True,
    )


def largest_share(shape: Shape, num_ranks: int) -> int:
    """Return the weights of a block that the busiest of so many ranks compresses: whole linears, largest first."""
    linears = sorted((out * into for (out, into), count in shape.linears(shape.experts) for _ in range(count)))[::-1]
    return max(sum(linears[rank::num_ranks]) for rank in range(min(num_ranks, len(linears))))


def plan(shape: Shape, method: Compressor, num_gpus: int, rates: Rates, work: Work = _WORK) -> list[Line]:
    """Return what each stage of a run takes.

    Args:
        shape: the model.
        method: how it is compressed.
        num_gpus: devices, each with a process of its own.
        rates: how fast things go.
        work: the amount of text.
    """
    sizes, on_machine = sizes_of(shape, method), min(num_gpus, GPUS_PER_MACHINE)
    settings = Plan(
        CalibrationSettings(work.calibration, batch_size=1),
        CompressionSettings(method),
        FinetuningSettings(max_epochs=work.epochs) if work.epochs else None,
        ExportSettings(),
        ReportSettings(batch_size=1),
    )
    data = DataShape(work.seq_len, {"text": work.evaluation}, 1)
    holding = Holding(num_gpus, num_gpus > 1, mixed=True, streams=num_gpus == 1, widened=bool(work.steps))
    training = Training(work.batch_size, recompute=True) if work.steps else None
    stages = stages_of_fit(sizes, settings, data, holding, training)
    spent = _Spent(shape, sizes, num_gpus, rates, work)
    lines = []
    for needs in stages:
        host = on_machine * (needs.host + needs.built + LIBRARY_BYTES) + ceil(needs.shared_host * on_machine / num_gpus)
        lines.append(Line(needs, host, *spent.of(needs.stage)))
    return lines


class _Spent(NamedTuple):
    """The bytes over the network, and the time, of each stage."""

    shape: Shape
    sizes: ModelSizes
    num_gpus: int
    rates: Rates
    work: Work

    def of(self, stage: str) -> tuple[int, float]:
        """Return the bytes that a device receives in a stage, and its seconds."""
        network, operations, disk, weights = self._amounts()[stage]
        rates = self.rates
        seconds = operations / rates.operations + weights / rates.weights + disk / rates.disk + network / rates.network
        return int(network), seconds

    def _amounts(self) -> dict[str, tuple[float, float, float, float]]:
        """Return bytes received, operations of a device, bytes of the disk and compressed weights, by stage."""
        sizes, work, gpus = self.sizes, self.work, self.num_gpus
        others = (gpus - 1) / gpus
        active = self.shape.num_blocks * self.shape.weights(self.shape.active)
        dense, stored = sizes.dense_blocks + sizes.skeleton, sizes.stored
        pass_of = 2 * active * work.seq_len / gpus
        share = self.shape.num_blocks * largest_share(self.shape, gpus)
        finetuning = FinetuningSettings()
        sequences = finetuning.num_sequences + finetuning.num_held_out
        steps = finetuning.num_sequences // finetuning.batch_size * work.epochs
        held = 4 * sizes.total.values + sizes.total.packed + sizes.others
        trained = 4 * sizes.trained_values
        tokens_of_step = work.batch_size * work.seq_len
        blockwise = sequences * pass_of * (3 + MATMUL_STEP // 2 * work.epochs)
        end_to_end = work.steps * (MATMUL_STEP + 2) * active * tokens_of_step
        return {
            "calibration": (2 * others * 8 * sizes.total.inputs, work.calibration * pass_of, dense, 0),
            "compression": (others * sizes.total.stored, 0, dense + sizes.total.stored, share),
            "dense reference": (0, work.evaluation * pass_of, dense, 0),
            "validation": (others * stored * ceil(work.evaluation / gpus), work.evaluation * pass_of, stored, 0),
            "finetuning": (2 * others * 4 * sizes.trained_values * steps, blockwise, dense + 2 * stored, 0),
            "export": (0, 0, 2 * stored, 0),
            # Whole blocks twice, and gradients once.
            "training": (others * work.steps * (2 * held + trained), end_to_end, stored, 0),
        }


def rows(models: list[str], gpus: list[int], method: str, rates: Rates) -> list[dict[str, Any]]:
    """Return the lines of a plan as JSON values."""
    found = []
    for name in models:
        for count in gpus:
            for line in plan(SHAPES[name], METHODS_OF_PLAN[method], count, rates):
                figures = {"device": line.needs.device, "host": line.host, "disk": line.needs.disk}
                figures |= {"network": line.network, "seconds": line.seconds}
                found.append({"model": name, "gpus": count, "stage": line.needs.stage, "method": method, **figures})
    return found


def show(found: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("model", "GPUs", "stage", "device", "host of a machine", "disk", "network", "time"):
        table.add_column(column, justify="left" if column in ("model", "stage") else "right")
    for row in found:
        sizes = [readable(row[key]) for key in ("device", "host", "disk", "network")]
        table.add_row(row["model"], str(row["gpus"]), row["stage"], *sizes, duration(row["seconds"]))
    Console(width=140).print(table)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"


def measured_rates(folder: Path, method: Compressor) -> Rates:
    """Measure how fast this machine goes: products, a linear compressed, and a file read again."""
    left = torch.randn(512, 512)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < 1:
        left @ left
        count += 1
    operations = 2 * 512**3 * count / (time.perf_counter() - started)
    linear = nn.Linear(512, 512, bias=False)
    started = time.perf_counter()
    method.compress(linear, torch.ones(512))
    weights = linear.weight.numel() / (time.perf_counter() - started)
    path = folder / "rate"
    path.write_bytes(bytes(2**25))
    started = time.perf_counter()
    path.read_bytes()
    disk = 2**25 / (time.perf_counter() - started)
    return Rates(operations, weights, disk, 1e9, "measured on this machine")


def check(folder: Path) -> None:
    """Compare the lines of a small model with its measured run, in one process on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, work = Shape(6, 512, 512, 256, 1536, 4096), Work(128, 8, 8, 0, epochs=0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.widest,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=8,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    Checkpoint("embedded").tokenizer.save_pretrained(folder / "dense")
    method = METHODS["2:4"]
    rates = measured_rates(folder, method)
    windows = torch.randint(3, shape.vocabulary, (work.calibration, work.seq_len))
    settings = Plan(CalibrationSettings(len(windows), batch_size=1), CompressionSettings(method))
    resident, run_dir = Resident(), folder / "run"
    run = CompressionRun(Checkpoint(str(folder / "dense")), run_dir, settings)
    with resident.stage("calibration"):
        run.calibrate(windows)
    with resident.stage("compression"):
        run.compress()
    with resident.stage("dense reference"):
        run.reference({"text": windows}, 1)
    with resident.stage("export"):
        run.compressed().save(folder / "export")
    disk = {"calibration": "run/moments", "compression": "run/compressed"}
    disk |= {"dense reference": "run/reference", "export": "export"}
    # The export lies beside the run, and holds one copy.
    own = ModelSizes.of(run.checkpoint, methods_of(run))
    assert replace(own, vocabulary=0) == replace(sizes_of(shape, method), vocabulary=0), (own, sizes_of(shape, method))
    table = Table(title="A small model on this machine: planned, and measured")
    for column in ("stage", "host planned", "measured", "disk planned", "measured", "time planned", "measured"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    lines = {line.needs.stage: line for line in plan(shape, method, 1, rates, work)}
    for stage, place in disk.items():
        line = lines[stage]
        written = sum(file.stat().st_size for file in (folder / place).rglob("*.*") if file.suffix != ".json")
        memory = [readable(line.host + line.needs.device), readable(resident.peaks.get(stage, 0))]
        times = [duration(line.seconds), duration(resident.seconds[stage])]
        table.add_row(stage, *memory, readable(line.needs.disk), readable(written), *times)
    Console(width=140).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--method", choices=METHODS_OF_PLAN, default="2:4")
    parser.add_argument("--rates", type=Path, help="JSON with operations, weights, disk, network and source")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/scale.json")
    parser.add_argument("--check", action="store_true", help="a small model, planned and measured")
    args = parser.parse_args()
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
        return
    rates = Rates(**json.loads(args.rates.read_text())) if args.rates else Rates()
    found = rows(args.models, args.gpus, args.method, rates)
    show(found, f"{args.method}, windows of 4096 tokens; rates {rates.source}")
    if args.save:
        head = {"rates": rates.__dict__, "hardware": hardware(1)}
        write_json(RESULTS / "scale.json", head | {"rows": found})


if __name__ == "__main__":
    main()
