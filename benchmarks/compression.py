"""The speed of the compressors against plain implementations of the paper's pseudo-code, and against their own parts.

python -m benchmarks.compression [--prune_sizes 1024 4096] [--quantize_size 192] [--codewords 256] [--options_size 192]

The plain ones stand in `naive.py`: a full sort of all scores; a loop over the clusters, all distances in one matrix.
Small sizes by default, so that it ends in two or three minutes; CPU seconds, least of several rounds in turn.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.kmeans import problem
from benchmarks.naive import lloyd, prune
from nowag_pl import NoWagPruner, NoWagQuantizer
from nowag_pl.functional.pruning import keep_largest, keep_n_of_m, normalized_scores
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.kmeans_start import kmeans_plus_plus
from nowag_pl.modules import MaskedLinear

ROUNDS = 3
LLOYD_ITERATIONS = 5


def seconds(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the least CPU seconds of each function, called in turn."""
    least: dict[str, float] = {}
    for _ in range(ROUNDS):  # the first compiles
        for name, function in functions.items():
            started = time.process_time()
            function()
            least[name] = min(least.get(name, float("inf")), time.process_time() - started)
    return least


def random_linear(size: int, seed: int = 0) -> tuple[nn.Linear, torch.Tensor]:
    """Return a random square linear and the full second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(size, size, bias=False)
    linear.weight.data = torch.randn(size, size, generator=generator)
    tokens = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    return linear, tokens.T @ tokens / len(tokens)


def pruning(size: int) -> tuple[str, dict[str, float], str]:
    """Measure pruning; the yardstick reads weight and scores once."""
    linear, matrix = random_linear(size)
    weight, second_moment = linear.weight.detach(), matrix.diagonal().contiguous()
    scores = normalized_scores(weight, second_moment)
    pruner, pattern = NoWagPruner(sparsity=0.5), NoWagPruner(pattern=(2, 4))
    keep, keep_2_4 = pruner.keep(scores), pattern.keep(scores)
    kept = pruner.compress(linear, second_moment).weight
    naive = prune(weight, second_moment, 0.5)
    assert float((kept != naive).float().mean()) < 1e-5, "both keep the same weights, but for rounding"
    functions: dict[str, Callable[[], Any]] = {
        "weight and scores read once": lambda: (weight.sum(), scores.sum()),
        "as much memory for the first time": lambda: torch.empty(2, size, size).fill_(0),
        "scores": lambda: normalized_scores(weight, second_moment),
        "mask of 50 % from scores": lambda: keep_largest(scores.view(1, -1), 0.5),
        "mask of 2:4 from scores": lambda: keep_n_of_m(scores, (2, 4)),
        "kept values, packed mask of 50 %": lambda: MaskedLinear(weight, keep),
        "kept values, packed mask of 2:4": lambda: MaskedLinear(weight, keep_2_4, pattern=(2, 4)),
        "NoWag-P 50 % from scores": lambda: MaskedLinear(weight, pruner.keep(scores)),
        "NoWag-P 2:4 from scores": lambda: MaskedLinear(weight, pattern.keep(scores), pattern=(2, 4)),
        "NoWag-P 50 %, all": lambda: pruner.compress(linear, second_moment),
        "NoWag-P 2:4, all": lambda: pattern.compress(linear, second_moment),
        "naive 50 %, all": lambda: prune(weight, second_moment, 0.5),
    }
    return f"pruning, {size} x {size}", seconds(functions), "weight and scores read once"


def quantization(size: int, codewords: int) -> tuple[str, dict[str, float], str]:
    """Measure k-means; the yardstick is an iteration of ours."""
    points, weights = problem(size, 6, 0)
    generator = torch.Generator().manual_seed(0)
    start = kmeans_plus_plus(points, weights, codewords, generator)
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: weighted_kmeans(
            points, weights, KMeansSettings(codewords, LLOYD_ITERATIONS), generator, codebook=start
        ),
        "k-means++ start": lambda: kmeans_plus_plus(points, weights, codewords, generator),
        "naive": lambda: lloyd(points, weights, start, LLOYD_ITERATIONS),
    }
    measured = seconds(functions)
    per_iteration = {
        "nowag_pl, one iteration": measured["ours"] / (LLOYD_ITERATIONS + 1),
        "k-means++ start": measured["k-means++ start"],
        "naive, one iteration": measured["naive"] / (LLOYD_ITERATIONS + 1),
    }
    return f"k-means, {size} x {size}, d = 6, k = {codewords}", per_iteration, "nowag_pl, one iteration"


def options(size: int) -> tuple[str, dict[str, float], str]:
    """Measure what the options cost; the yardstick is the paper's NoWag-VQ."""
    linear, matrix = random_linear(size)
    quantizer, pruner = NoWagQuantizer(4, 256), NoWagPruner()
    functions: dict[str, Callable[[], Any]] = {
        "NoWag-VQ, d = 4, k = 256": lambda: quantizer.compress(linear, matrix.diagonal()),
        "NoWag-VQ, feedback": lambda: NoWagQuantizer(4, 256, update="feedback").compress(linear, matrix),
        "NoWag-VQ, alternating": lambda: NoWagQuantizer(4, 256, update="alternating").compress(linear, matrix),
        "NoWag-P 50 %": lambda: pruner.compress(linear, matrix.diagonal()),
        "NoWag-P 50 %, refit": lambda: NoWagPruner(update="refit").compress(linear, matrix),
        "NoWag-P 50 %, alternating": lambda: NoWagPruner(update="alternating").compress(linear, matrix),
    }
    return f"options, {size} x {size}", seconds(functions), "NoWag-VQ, d = 4, k = 256"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prune_sizes", type=int, nargs="+", default=[1024, 4096], help="rows and columns of the pruned matrices"
    )
    parser.add_argument("--quantize_size", type=int, default=192, help="rows and columns of the quantized matrix")
    parser.add_argument("--codewords", type=int, default=256)
    parser.add_argument("--options_size", type=int, default=192, help="rows and columns to measure the options on")
    args = parser.parse_args()
    console = Console(width=120)
    for part in (
        *(partial(pruning, size) for size in args.prune_sizes),
        lambda: quantization(args.quantize_size, args.codewords),
        lambda: options(args.options_size),
    ):
        title, measured, yardstick = part()
        table = Table(title=f"{title}, {torch.get_num_threads()} threads")
        for column in ("what", "CPU seconds", "ratio"):
            table.add_column(column, justify="left" if column == "what" else "right")
        for what, value in measured.items():
            table.add_row(what, f"{value:.4f}", f"{value / measured[yardstick]:.1f}")
        console.print(table)


if __name__ == "__main__":
    main()
