"""How much host memory does a process take to make its shards of a model of Llama-2-7B's shapes?

python -m benchmarks.sharded_memory [--blocks 4] [--processes 1 2 4] [--folder runs/benchmark_sharded]

Writes a random model with Llama-2-7B's exact shapes and fewer blocks, compresses it (2:4), and lets one, two and four
CPU processes make their shards for a training end to end: once of the dense model, of which everything is trained in
float32, and once of the compressed one, of which embeddings and head are frozen in bfloat16. Shows the highest
resident memory of a process over what it had before, what it holds in the end, and what `nowag_pl/needs.py` expects:
the shards, and a block. With --loss every process measures the same tokens, whose loss does not depend on the number of
processes.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.memory import METHODS, Resident, write_model
from benchmarks.results import hardware
from nowag_pl.files import write_json
from nowag_pl.lit.building import build_sharded
from nowag_pl.lit.precision import widen
from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.models.shards import local_part
from nowag_pl.stages.compression_run import CompressionRun
from nowag_pl.stages.plan import CalibrationSettings, CompressionSettings, Plan
from nowag_pl.stages.sizes import Holding, ModelSizes

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = 16


def make_models(folder: Path, num_blocks: int) -> None:
    """Write the dense model and its compressed form, unless they are there."""
    dense = folder / f"dense_{num_blocks}"
    if not (dense / "model.safetensors.index.json").is_file():
        write_model(dense, num_blocks)
    export = folder / f"export_{num_blocks}"
    if not (export / "config.json").is_file():
        plan = Plan(CalibrationSettings(1, batch_size=1), CompressionSettings(METHODS["2:4"]))
        run = CompressionRun(Checkpoint(str(dense)), folder / f"run_{num_blocks}", plan)
        run.calibrate(torch.randint(3, 32000, (1, 16), generator=torch.Generator().manual_seed(0)))
        run.compress()
        run.compressed().save(export)


def measure(folder: Path, with_loss: bool) -> dict[str, Any]:
    """Make this process's shards of a model, and return what they took; every process must call it."""
    checkpoint = Checkpoint(str(folder), verify=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    resident = Resident()
    with resident.stage("build"):
        model = build_sharded(checkpoint, None, False, mesh, lambda model: widen(model, everything=False))
    held = sum(local_part(parameter).nbytes for parameter in model.parameters())
    sizes = ModelSizes.of(checkpoint)
    holding = Holding(dist.get_world_size(), sharded=dist.get_world_size() > 1, widened=True)
    parameters = 4 * sizes.trained_values + sizes.itemsize * sizes.frozen_values + sizes.total.packed
    shards = -(-parameters // dist.get_world_size())
    block = holding.building(sizes, parameters) if holding.sharded else max(sizes.compressed_block, sizes.skeleton)
    found = {"peak": resident.peaks["build"], "held": held, "shards": shards, "block": block}
    return found | ({"loss": _loss(model)} if with_loss else {})


@torch.no_grad()
def _loss(model: torch.nn.Module) -> float:
    tokens = torch.arange(3, 3 + NUM_TOKENS)[None] * 7
    logits = model(input_ids=tokens, use_cache=False).logits
    return float(F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))


def work(folder: Path, output: Path, with_loss: bool) -> None:
    """Measure in this process, one of a group that the environment describes."""
    dist.init_process_group("gloo")
    try:
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, measure(folder, with_loss))
        if dist.get_rank() == 0:
            output.write_text(json.dumps(gathered))
    finally:
        dist.destroy_process_group()


def on_processes(count: int, folder: Path, output: Path, with_loss: bool) -> list[dict[str, Any]]:
    """Return what each of so many processes measures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.sharded_memory", "--work", str(folder), str(output)]
    command += ["--loss"] * with_loss
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**os.environ, **shared, "RANK": str(rank)}) for rank in range(count)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("a process ended with an error")
    measured: list[dict[str, Any]] = json.loads(output.read_text())
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--models", nargs="+", choices=["dense", "export"], default=["dense", "export"])
    parser.add_argument("--loss", action="store_true", help="measure the same tokens with each number of processes")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_sharded"))
    parser.add_argument("--json", type=Path, help="where the figures are written, too")
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(*args.work, args.loss)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    make_models(args.folder, args.blocks)
    table = Table(title=f"Making shards for a training: Llama-2-7B's shapes, {args.blocks} blocks, MiB of a process")
    for column in ("model", "processes", "held", "highest", "expected: shards", "and a block", "highest / expected"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_column("loss", justify="right")
    rows = []
    for name in args.models:
        for count in args.processes:
            measured = on_processes(
                count, args.folder / f"{name}_{args.blocks}", args.folder / "measured.json", args.loss
            )
            worst = max(measured, key=lambda each: each["peak"])
            expected = worst["shards"] + worst["block"]
            rows.append({"model": name, "processes": count, "expected": expected, **worst})
            numbers = [f"{worst[key] / 2**20:.0f}" for key in ("held", "peak", "shards")]
            ratio = f"{worst['peak'] / expected:.2f}"
            title = "dense" if name == "dense" else "2:4"
            table.add_row(
                title,
                str(count),
                *numbers,
                f"{expected / 2**20:.0f}",
                ratio,
                f"{worst['loss']:.6f}" if args.loss else "",
            )
    Console(width=140).print(table)
    if args.json is not None:
        write_json(args.json, {"blocks": args.blocks, "hardware": hardware(1), "rows": rows})


if __name__ == "__main__":
    main()
