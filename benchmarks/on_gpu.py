"""Everything that needs a GPU, one step after the other; scripts/on_gpu.sh calls it.

Tests marked gpu, among them every kernel against its reference; k-means, the trellis' search and reading, decoding and
2:4 linears against dense ones; a block of Llama-2-7B's shapes by every method; and a training sharded by FSDP2 on one
device. A step that fails or takes too long does not keep the others from running. docs/on_a_gpu.md says what has run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from benchmarks.results import RESULTS, hardware
from benchmarks.scale import SHAPES
from nowag_pl import ArmorCompressor, NoWagPruner, NoWagQuantizer, NoWagTrellis
from nowag_pl.files import write_json

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 25 * 60  # seconds of all steps
TAIL = 6000  # characters that are kept of what a step says


class Step(NamedTuple):
    """A command.

    Attributes:
        name: of its entry in the results.
        arguments: of Python.
        small: of Python in a dry run; None leaves it out.
        seconds: after which it is stopped.
    """

    name: str
    arguments: list[str]
    small: list[str] | None
    seconds: int


def steps(folder: Path) -> list[Step]:
    """Return all steps; what they write goes into a folder."""
    fit = ["main.py", "fit", "--config=configs/method/nowag_p_2_4.yaml", "--config=configs/trainer/fsdp2.yaml"]
    fit += [
        "--trainer.max_epochs=1",
        "--trainer.devices=1",
        "--data.max_train_windows=8",
        f"--run_dir={folder / 'fsdp2'}",
    ]
    kmeans = ["-m", "benchmarks.kmeans", "--block"]
    trellis = ["-m", "benchmarks.trellis"]
    return [
        Step("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"], None, 420),
        Step("block", ["-m", "benchmarks.on_gpu", "--block"], ["-m", "benchmarks.on_gpu", "--block", "--dry_run"], 480),
        Step("kmeans", [*kmeans, "--device=cuda"], [*kmeans, "--shapes", "64x64", "--matmul_size=256"], 180),
        Step("viterbi", [*trellis, "--sequences=64"], [*trellis, "--sequences=1", "--state_bits", "8"], 120),
        Step("reading", [*trellis, "--read"], None, 60),
        Step(
            "decode_and_2_4",
            ["-m", "benchmarks.inference", "--device=cuda"],
            ["-m", "benchmarks.inference", "--device=cpu", "--shapes", "64x64", "--quick", "--rounds=1"],
            180,
        ),
        Step("crossover", ["-m", "benchmarks.inference", "--crossover", "--device=cuda"], None, 60),
        Step("fsdp2", [*fit, "--trainer.accelerator=cuda"], [*fit, "--trainer.accelerator=cpu"], 180),
    ]


def run(step: Step, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run a step, and return how it ended, its time and what it said last."""
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, said = -1, f"stopped after {seconds:.0f} s\n" + str(error.stdout or "")
    result = {"name": step.name, "ended": code, "seconds": round(time.perf_counter() - started, 1)}
    # Lines between marks are figures.
    figures = re.findall(r"^figures: (.*)$", said, flags=re.MULTILINE)
    return result | {"figures": [json.loads(each) for each in figures], "said": said[-TAIL:]}


def measure_block(device: torch.device, small: bool) -> None:
    """Compress the linears of a block of Llama-2-7B's shapes by every method, and print seconds, loss and memory."""
    methods = {
        "50%": NoWagPruner(sparsity=0.5),
        "2:4": NoWagPruner(pattern=(2, 4)),
        "vq": NoWagQuantizer(subvector_dim=6, codebook_size=16 if small else 4096, max_iters=2 if small else 100),
        "trellis": NoWagTrellis(bits=2),
        "armor": ArmorCompressor(block_size=16 if small else 128, max_iters=2 if small else 100),
    }
    divisor = 64 if small else 1
    for name, method in methods.items():
        seconds, weights, losses = 0.0, 0, []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for (rows, columns), count in SHAPES["7B"].linears(1):
            generator = torch.Generator().manual_seed(0)
            linear = nn.Linear(columns // divisor, rows // divisor, bias=False).to(torch.bfloat16)
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(torch.bfloat16)
            moment = torch.rand(linear.in_features, generator=generator) + 0.1
            linear, moment = linear.to(device), moment.to(device)
            # Without correlations, where a method takes those of all pairs of inputs.
            given = torch.diag(moment) if method.full_second_moment else moment
            started = time.perf_counter()
            compressed = method.compress(linear, given)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += count * (time.perf_counter() - started)
            weights += count * linear.weight.numel()
            error = (compressed.weight.detach().float() - linear.weight.detach().float()).square() * moment
            losses.append(float(error.sum() / (linear.weight.detach().float().square() * moment).sum()))
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        figures = {"method": name, "seconds": seconds, "weights_a_second": weights / seconds, "loss": losses}
        print("figures: " + json.dumps(figures | {"peak_bytes": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, as small as it gets; writes nothing")
    parser.add_argument("--block", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.block:
        measure_block(torch.device("cpu" if args.dry_run else "cuda"), args.dry_run)
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("error: Expected a CUDA device, but there is none. --dry_run tries the steps on the CPU.")
    console, results, end = Console(), [], time.monotonic() + LIMIT
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(Path(folder)):
            arguments = step.small if args.dry_run else step.arguments
            left = min(step.seconds, end - time.monotonic())
            if arguments is None or left < 1:
                console.print(f"{step.name}: left out")
                continue
            results.append(run(step, arguments, left))
            ended = results[-1]["ended"]
            console.print(
                f"{step.name}: {'passed' if ended == 0 else f'ended with {ended}'} in {results[-1]['seconds']} s"
            )
            if ended:
                console.print(results[-1]["said"][-1500:], markup=False)
    if not args.dry_run:
        name = re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower()
        head = {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "hardware": hardware(torch.get_num_threads()),
        }
        write_json(RESULTS / f"{name}.json", head | {"rows": results})
        console.print(f"Figures written to {RESULTS / f'{name}.json'}")
    if any(each["ended"] for each in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
