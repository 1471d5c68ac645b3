"""How much of what one-shot compression lost do blockwise finetuning and distillation win back?

python -m benchmarks.finetuning [--shared ../shared] [--run_dir runs/benchmark_finetuning] [--two_ranks]

Runs `main.py fit` with configs/finetuning/embedded.yaml and embedded_distillation.yaml after 2:4 pruning and 2-bit
quantization, on the embedded model and, where there is a folder with models/prose-llama, data/prose-calibration.txt and
data/prose-eval.txt, on that. Runs that are finished are not made again. With --two_ranks each run is made on two
processes as well, and compared with the one on one.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nowag_pl.files import read_tensors
from nowag_pl.run.layout import COMPRESSED, MOMENTS

ROOT = Path(__file__).resolve().parent.parent
METHODS = {
    "2:4": ["--config=configs/method/nowag_p_2_4.yaml"],
    "2-bit VQ": ["--config=configs/method/nowag_vq_2bit_small.yaml"],
    "2-bit VQ, weighting: output": [
        "--config=configs/method/nowag_vq_2bit_small.yaml",
        "--compression.compressor.init_args.weighting=output",
    ],
}
FINETUNING = ["--config=configs/finetuning/embedded.yaml", "--config=configs/finetuning/embedded_distillation.yaml"]
PHASES = ("dense", "one_shot", "blockwise", "finetuned")
STEP_SEQUENCES = 8  # of a training step, over all ranks


def models(shared: Path) -> dict[str, list[str]]:
    """Return the arguments of each model that is there."""
    found = {"embedded": ["--model.path=embedded"]}
    folder = shared / "models" / "prose-llama"
    if folder.is_dir():
        found["prose-llama"] = [
            f"--model.path={folder}",
            f"--data.calibration_files=[{shared / 'data' / 'prose-calibration.txt'}]",
            f"--data.eval_files.prose={shared / 'data' / 'prose-eval.txt'}",
            "--data.seq_len=256",
        ]
    return found


def fit(run_dir: Path, method: str, arguments: list[str], ranks: int) -> dict[str, Any]:
    """Run the command line; return the report."""
    command = [sys.executable, "main.py", "fit", f"--run_dir={run_dir.resolve()}", *METHODS[method], *FINETUNING]
    command += [*arguments, "--trainer.accelerator=cpu", f"--trainer.devices={ranks}", "--export.enabled=false"]
    command += [f"--data.train_batch_size={STEP_SEQUENCES // ranks}"]
    if ranks > 1:
        command += ["--trainer.strategy=ddp"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run_dir / "report.json").read_text())


def compare(one: Path, two: Path) -> tuple[float, int, int]:
    """Return the largest relative difference of a second moment, and how many of the masks and codes differ, of all."""
    largest, different, count = 0.0, 0, 0
    for file in sorted((one / MOMENTS).glob("*.safetensors")):
        moments, others = (read_tensors(folder / MOMENTS / file.name)[0] for folder in (one, two))
        for name, moment in moments.items():
            difference = (moment.double() - others[name].double()).abs() / moment.double().clamp_min(1e-30)
            largest = max(largest, float(difference.max()))
        tensors, others = (read_tensors(folder / COMPRESSED / file.name)[0] for folder in (one, two))
        for name, tensor in tensors.items():
            if name.endswith(("mask", "codes")):
                count += 1
                different += not torch.equal(tensor, others[name])
    return largest, different, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--run_dir", type=Path, default=Path("runs/benchmark_finetuning"))
    parser.add_argument("--two_ranks", action="store_true", help="compare two processes with one")
    parser.add_argument("--model", choices=("embedded", "prose-llama"), help="only this one")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this one; may be repeated")
    args = parser.parse_args()
    console = Console(width=140)
    gains = Table(title="Perplexity, and in brackets the share of the gap to the dense model that is closed")
    for column in (
        "model",
        "method",
        "dense",
        "one-shot",
        "blockwise",
        "end to end",
        "KL (nats)",
        "finetuning seconds",
    ):
        gains.add_column(column, justify="left" if column in ("model", "method") else "right")
    ranks = Table(title="Two processes against one")
    for column in ("model", "method", "second moments", "masks or codes that differ", "perplexity"):
        ranks.add_column(column, justify="left" if column in ("model", "method") else "right")
    for model, arguments in models(args.shared.resolve()).items():
        if args.model not in (None, model):
            continue
        for method in args.method or METHODS:
            run_dir = args.run_dir / re.sub(r"[^A-Za-z0-9.-]+", "_", f"{model}-{method}")
            report = fit(run_dir, method, arguments, 1)
            (figures,), (divergences,) = report["perplexity"].values(), report["kl_divergence"].values()
            dense, one_shot, *rest = (figures[phase] for phase in PHASES)
            gains.add_row(
                model,
                method,
                f"{dense:.3f}",
                f"{one_shot:.3f}",
                *(f"{value:.3f} ({(one_shot - value) / (one_shot - dense):.1%})" for value in rest),
                " -> ".join(f"{divergences[phase]:.4f}" for phase in PHASES[1:]),
                f"{report['seconds']['finetuning']:.0f}",
            )
            if args.two_ranks:
                two = fit(run_dir.with_name(f"{run_dir.name}-two"), method, arguments, 2)
                moments, different, count = compare(run_dir, run_dir.with_name(f"{run_dir.name}-two"))
                (others,) = two["perplexity"].values()
                changes = [abs(others[phase] / figures[phase] - 1) for phase in PHASES[1:]]
                ranks.add_row(
                    model, method, f"{moments:.1e}", f"{different} of {count}", ", ".join(f"{c:.1e}" for c in changes)
                )
    console.print(gains)
    if args.two_ranks:
        console.print(ranks)


if __name__ == "__main__":
    main()
