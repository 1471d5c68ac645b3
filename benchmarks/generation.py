"""How many tokens a second does a compressed model generate, and how much memory does that take?

python -m benchmarks.generation --dense <folder> --compressed <export> ... [--gguf <file> ...] [--threads 2]

Models generate in turns, one token at a time, so that a busy moment of the machine meets all of them: the dense model
in bfloat16 and in float32, and each export as it opens and accelerated. The median of the rounds is shown, as
a multiple of the faster dense one as well. GGUF files run in llama.cpp where llama-cpp-python is installed. With
--threads 1, the time is that which the process ran, not that in which it waited for others. Peak memory is that of
another process, which opens the model and generates; --no-memory leaves it out.
"""

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from nowag_pl import accelerate, load_compressed

PROMPT_TOKENS = 16


class Way(NamedTuple):
    """A way to run a model."""

    path: str
    name: str

    def generator(self, threads: int) -> Callable[[int], None]:
        """Open the model, and return what generates so many tokens."""
        if self.name == "llama.cpp":
            return llama_cpp(self.path, threads)
        prompt = torch.arange(100, 100 + PROMPT_TOKENS)[None]
        model = self.opened()

        def generate(num_tokens: int) -> None:
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
            )

        return generate

    def opened(self) -> Any:
        """Open the model."""
        if self.name.startswith("dense"):
            return AutoModelForCausalLM.from_pretrained(self.path, dtype=getattr(torch, self.name.split()[1])).eval()
        model = load_compressed(self.path, packed=self.name == "packed")
        return accelerate(model) if self.name == "accelerated" else model


def llama_cpp(path: str, threads: int) -> Callable[[int], None]:
    from llama_cpp import Llama

    model = Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(num_tokens: int) -> None:
        model.reset()
        tokens = model.generate(list(range(100, 100 + PROMPT_TOKENS)), temp=0.0)
        for _ in range(num_tokens):
            next(tokens)

    return generate


def clock(threads: int) -> float:
    """Return seconds, of this process's own work where it works on one thread."""
    return time.process_time() if threads == 1 else time.perf_counter()


def speeds(ways: Sequence[Way], num_tokens: int, rounds: int, threads: int) -> list[float]:
    """Return the tokens per second of each way after the prompt, the median of the rounds but for the first one."""
    generators = [way.generator(threads) for way in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for number in range(rounds + 1):
        for generate, taken in zip(generators, seconds, strict=True):
            before = clock(threads)
            generate(1)
            start = clock(threads)
            generate(num_tokens + 1)
            if number:
                # The time of the prompt is that of one token.
                taken.append(clock(threads) - start - (start - before))
    return [num_tokens / median(taken) for taken in seconds]


def peak_bytes(way: Way, threads: int) -> int:
    """Return the peak memory of a process that opens the model and generates a few tokens."""
    command = [sys.executable, "-m", "benchmarks.generation", "--peak", *way, "--threads", str(threads)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def ways_of(args: argparse.Namespace) -> list[Way]:
    ways = [Way(args.dense, f"dense {dtype}") for dtype in ("bfloat16", "float32")]
    names = ("as it opens", "accelerated", *(["packed"] if args.packed else []))
    ways += [Way(folder, name) for folder in args.compressed for name in names]
    if args.gguf and find_spec("llama_cpp") is None:
        Console(stderr=True).print("llama-cpp-python is not installed: GGUF files are left out")
        return ways
    return ways + [Way(file, "llama.cpp") for file in args.gguf]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", help="folder of the dense model")
    parser.add_argument("--compressed", nargs="*", default=[], help="folders of packed exports of it")
    parser.add_argument("--gguf", nargs="*", default=[], help="files for llama.cpp, such as of Q2_K")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--packed", action="store_true", help="show exports that stay packed as well, which is slow")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--peak", nargs=2, metavar=("PATH", "WAY"), help="print the peak memory of one way, and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.peak:
        Way(*args.peak).generator(args.threads)(4)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    ways = ways_of(args)
    found = speeds(ways, args.tokens, args.rounds, args.threads)
    dense = max(speed for way, speed in zip(ways, found, strict=True) if way.name.startswith("dense"))
    table = Table(title=f"{args.threads} threads, {args.tokens} tokens after {PROMPT_TOKENS}")
    for column in ("model", "runs", "tokens per second", "beside dense", "peak memory"):
        table.add_column(column, justify="left" if column in ("model", "runs") else "right")
    for way, speed in zip(ways, found, strict=True):
        memory = "" if args.no_memory else f"{peak_bytes(way, args.threads) / 2**20:.0f} MiB"
        table.add_row(Path(way.path).name, way.name, f"{speed:.1f}", f"{speed / dense:.2f}", memory)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
