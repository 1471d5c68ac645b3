"""How much memory does it take to measure a model with a large vocabulary?

python -m benchmarks.evaluation_memory [--vocabulary 262144] [--hidden 640] [--dtype bfloat16] [--chunk_mib 256]

Writes a random Gemma 3 of two blocks with tied embeddings, measures it (`main.py validate`), and compresses and
compares it with the dense model (`main.py fit`). Shows the highest resident memory of each command, with that of Python
and all libraries.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from nowag_pl.models.checkpoint import Checkpoint
from nowag_pl.run.wording import readable

ROOT = Path(__file__).resolve().parent.parent


def write_model(folder: Path, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
    """Write a random model of two blocks with the embedded model's tokenizer, whose words are the first few."""
    config = Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=hidden // 4,
        layer_types=["sliding_attention", "full_attention"],
        dtype=dtype,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    Checkpoint("embedded").tokenizer.save_pretrained(folder)


def peak_of(arguments: list[str]) -> tuple[int, float]:
    """Return the highest resident memory of a command in bytes, and its seconds."""
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    # Linux counts in KiB.
    return usage.ru_maxrss * 2**10, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--hidden", type=int, default=640)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--chunk_mib", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark_evaluation_memory"))
    args = parser.parse_args()
    model = args.folder.absolute() / f"{args.vocabulary}_{args.hidden}_{args.dtype}"
    if not (model / "model.safetensors").is_file():
        write_model(model, args.vocabulary, args.hidden, getattr(torch, args.dtype))
    shared = [f"--model.path={model}", f"--data.eval_chunk_mib={args.chunk_mib}", "--trainer.accelerator=cpu"]
    shared += ["--data.seq_len=512", "--data.max_eval_windows=4"]
    fit = ["fit", *shared, "--calibration.num_sequences=4", "--export.enabled=false", "--inspection.enabled=false"]
    table = Table(title=f"Peak memory, vocabulary {args.vocabulary:,}, hidden {args.hidden}, {args.dtype}")
    for column in ("command", "resident", "seconds"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for title, arguments in {"fit": fit, "validate": ["validate", *shared]}.items():
        peak, seconds = peak_of([*arguments, f"--run_dir={args.folder / title}"])
        table.add_row(title, readable(peak), f"{seconds:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
