"""Every shipped method on a real pretrained Llama: real bits, perplexity, divergence, time and memory.

python -m benchmarks.real_model [--methods dense nowag_p_50 wanda_50] [--model smollm2] [--held_out]

SmolLM2-135M-Instruct (make real sets it up), WikiText-2 and prose from --shared where they are there, else Python's
documentation. All methods take more than an hour on two cores; each is one run of `main.py fit`, which goes on where it
was, and finished runs are read. Figures go to benchmarks/results/real_model.json, tables to the pages by
`python -m benchmarks.results`. With --held_out another stretch of the text is measured after calibration on other
sequences: choose settings by that, never by what is shown.
"""

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.folder_quality import measure
from benchmarks.protocol import HELD_OUT, ROOT, SEQ_LEN, STANDARD, Protocol, Texts, arguments, described, texts
from benchmarks.results import RESULTS, hardware, keep_rows
from nowag_pl.files import read_json, write_json
from nowag_pl.models.checkpoint import Checkpoint

DENSE = "dense"
METHODS = [DENSE, *sorted(path.stem for path in (ROOT / "configs" / "method").glob("*.yaml"))]
REPORT, COST = "report.json", "cost.json"
DENSE_BITS = 16.0


def fit(run_dir: Path, options: list[str], threads: int) -> None:
    """Run `main.py fit` unless it is finished; what each attempt cost is added up in cost.json.

    Raises:
        RuntimeError: it fails.
    """
    if (run_dir / REPORT).is_file():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={run_dir}"]
    logger += ["--trainer.logger.name=csv", "--trainer.logger.version=figures"]
    command = [sys.executable, "main.py", "fit", f"--run_dir={run_dir}", *options, *logger]
    command += ["--trainer.accelerator=cpu", "--inspection.enabled=false", "--export.enabled=false"]
    started = time.perf_counter()
    with open(run_dir / "log.txt", "ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    before = read_json(run_dir / COST) if (run_dir / COST).is_file() else {}
    cost = {
        "cpu_seconds": before.get("cpu_seconds", 0.0) + usage.ru_utime + usage.ru_stime,
        "seconds": before.get("seconds", 0.0) + time.perf_counter() - started,
        "peak_memory_bytes": max(before.get("peak_memory_bytes", 0), usage.ru_maxrss * 1024),
        "hardware": hardware(threads),
    }
    write_json(run_dir / COST, cost)
    if process.returncode:
        raise RuntimeError(f"Expected main.py fit to succeed, but it ended with {process.returncode}: {log.name}.")


def row_of(run_dir: Path, method: str, text: str) -> dict[str, Any]:
    """Return the figures of a finished run."""
    report, cost = read_json(run_dir / REPORT), read_json(run_dir / COST)
    return {
        "method": method,
        "bits_per_weight": report["bits_per_weight"],
        "sparsity": report["sparsity"],
        "perplexity": report["perplexity"][text]["one_shot"],
        "dense_perplexity": report["perplexity"][text]["dense"],
        "kl_divergence": report["kl_divergence"][text]["one_shot"],
        "top1_agreement": _logged(run_dir, f"top1_agreement/{text}"),
        "windows": report["protocol"][text]["num_windows"],
        "cpu_seconds": cost["cpu_seconds"],
        "stage_seconds": report["seconds"],
        "peak_memory_bytes": cost["peak_memory_bytes"],
        "hardware": cost["hardware"],
        "command": f"python main.py fit --model.path {report['model']} --config configs/method/{method}.yaml",
    }


def _logged(run_dir: Path, name: str) -> float | None:
    """Return the last value that Lightning's logger has of a metric, or None."""
    file = run_dir / "csv" / "figures" / "metrics.csv"
    if not file.is_file():
        return None
    with open(file, encoding="utf-8", newline="") as opened:
        values = [row[name] for row in csv.DictReader(opened) if row.get(name)]
    return float(values[-1]) if values else None


def dense_row(run_dir: Path, model: str, chosen: Texts, windows: int | None, threads: int) -> dict[str, Any]:
    """Measure the dense model, once."""
    file = run_dir / "quality.json"
    if not file.is_file():
        started = time.process_time()
        checkpoint = Checkpoint(model)
        quality = measure(checkpoint, None, chosen, SEQ_LEN, windows)
        write_json(file, {**quality, "cpu_seconds": time.process_time() - started, "hardware": hardware(threads)})
    return {
        "method": DENSE,
        "bits_per_weight": DENSE_BITS,
        "sparsity": 0.0,
        "kl_divergence": None,
        "top1_agreement": None,
        "peak_memory_bytes": None,
        **read_json(file),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help="; ".join(METHODS)
    )
    parser.add_argument("--model", default="smollm2", help="model.path: a name, a folder or a GGUF file")
    parser.add_argument("--windows", type=int, help="evaluate the first windows only")
    parser.add_argument("--held_out", action="store_true", help="text and calibration to choose settings by")
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--output", type=Path, default=Path("runs/real_model"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="JSON file; default: benchmarks/results/real_model*.json")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.chdir(ROOT)
    protocol: Protocol = HELD_OUT if args.held_out else STANDARD
    chosen = texts(protocol, args.shared, args.output / "texts")
    name = Path(args.model).name
    place = args.output / name / (protocol.name + (f"-{args.windows}" if args.windows else ""))
    rows, console = [], Console(width=140)
    for method in args.methods:
        console.print(f"{method} in {place / method}")
        if method == DENSE:
            rows.append(dense_row(place / DENSE, args.model, chosen, args.windows, args.threads))
        else:
            options = [f"--model.path={args.model}", f"--config=configs/method/{method}.yaml"]
            try:
                fit(place / method, [*options, *arguments(protocol, chosen, args.windows)], args.threads)
            except RuntimeError as error:
                console.print(f"{method} failed: {error}")
                continue
            rows.append(row_of(place / method, method, chosen.eval_name))
        console.print({key: rows[-1][key] for key in ("bits_per_weight", "perplexity", "kl_divergence", "cpu_seconds")})
    suffix = "" if place.name == STANDARD.name else f"_{place.name}"
    path = args.results or RESULTS / f"real_model{suffix}.json"
    keep_rows(path, {"model": name, "protocol": described(protocol, chosen, args.windows)}, rows)
    console.print(f"Results written to {path}")


if __name__ == "__main__":
    main()
