"""ARMOR over iterations: loss, perplexity and time, and what an iteration costs beside the product that it lowers.

python -m benchmarks.armor [--shared ../shared] [--seeds 0 1 2] [--iterations 0 50 200 500] [--choices]

On the embedded model and, where there is a folder with models/prose-llama, data/prose-calibration.txt and
data/prose-eval.txt, on that: 2:4 with blocks of 32, protocol of benchmarks.prose_llama, KL divergence on the first 48
windows. Then one iteration against the product A S B and its gradient by autograd, side by side. With --choices, other
learning rates, weightings and ways to choose groups are compared on prose-llama.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prose_llama import (
    BATCH,
    KL_WINDOWS,
    NUM_SEQUENCES,
    SEQ_LEN,
    compressed_copy,
    evaluate,
    second_moments,
)
from nowag_pl import ArmorCompressor, NoWagPruner
from nowag_pl.data.python_docs import python_docs
from nowag_pl.data.tokens import random_windows, tokenize, whole_windows
from nowag_pl.functional.armor.fit import ArmorSettings, fit_armor
from nowag_pl.functional.armor.objective import ArmorTarget, identity_factors, reconstruct
from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.pruning import keep_n_of_m, nowag_scores
from nowag_pl.models.checkpoint import Checkpoint

ROUNDS, ITERATIONS = 7, 20
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "learning rate 1e-4": {"learning_rate": 1e-4},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "random groups": {"selection": "random"},
    "output weighting": {"weighting": "output"},
    "blocks of 16": {"block_size": 16},
    "blocks of 8": {"block_size": 8},
}


class Subject(NamedTuple):
    """A model with its texts."""

    name: str
    checkpoint: Checkpoint
    calibration: Tensor  # tokens
    windows: Tensor  # to evaluate on


def subjects(shared: Path) -> Iterator[Subject]:
    """Yield the models that are there."""
    embedded = Checkpoint("embedded")
    calibration, held_out = (tokenize(list(python_docs(split)), embedded.tokenizer) for split in ("train", "eval"))
    yield Subject("embedded", embedded, calibration, whole_windows(held_out, SEQ_LEN).long())
    folder = shared / "models" / "prose-llama"
    if folder.is_dir():
        prose = Checkpoint(str(folder))
        calibration, held_out = (
            tokenize([(shared / "data" / f"prose-{name}.txt").read_text(encoding="utf-8")], prose.tokenizer)
            for name in ("calibration", "eval")
        )
        yield Subject("prose-llama", prose, calibration, whole_windows(held_out, SEQ_LEN).long())


def compare(subject: Subject, methods: dict[str, Callable[[int], Any]], seeds: list[int]) -> Table:
    """Return a table of what each method, made from a seed, gives on a model."""
    model: Any = subject.checkpoint.load()
    with torch.no_grad():
        batches = subject.windows[:KL_WINDOWS].split(BATCH)
        reference = [model(input_ids=batch).logits[:, :-1].flatten(0, 1) for batch in batches]
    moments = {
        seed: second_moments(subject.checkpoint, random_windows(subject.calibration, SEQ_LEN, NUM_SEQUENCES, seed))
        for seed in seeds
    }
    dense = evaluate(model, subject.windows, reference)[0]
    table = Table(title=f"{subject.name}, mean of {len(seeds)} seed(s); dense: {dense:.3f}")
    for column in ("method", "loss", "perplexity", "gap closed", "KL (nats)", "top-1", "CPU seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    start = None
    for name, make in methods.items():
        rows = []
        for seed in seeds:
            result, loss, seconds = compressed_copy(model, make(seed), moments[seed])
            rows.append((loss, *evaluate(result, subject.windows, reference), seconds))
        loss, perplexity, divergence, agreement, seconds = torch.tensor(rows).mean(dim=0).tolist()
        start = perplexity if start is None else start
        closed = (start - perplexity) / (start - dense)
        table.add_row(
            name,
            f"{loss:.4f}",
            f"{perplexity:.3f}",
            f"{closed:.1%}",
            f"{divergence:.4f}",
            f"{agreement:.3f}",
            f"{seconds:.1f}",
        )
    return table


def armor(**settings: Any) -> Callable[[int], ArmorCompressor]:
    """Return a function that makes a compressor of a seed."""
    settings = {"block_size": 32} | settings
    return lambda seed: ArmorCompressor(seed=seed, **settings)


def pruner(seed: int) -> NoWagPruner:
    """Return NoWag-P at 2:4, which needs no seed."""
    return NoWagPruner(pattern=(2, 4))


def timings(size: int, block: int) -> tuple[float, float, float, float]:
    """Return the seconds of an iteration, of A S B and its gradient by blocks and dense, and the ratio by blocks."""
    generator = torch.Generator().manual_seed(0)
    weight = normalize(torch.randn(size, size, generator=generator)).weight
    second_moment = torch.exp(torch.randn(size, generator=generator))
    target = ArmorTarget(weight, torch.ones(size), second_moment)
    start = identity_factors(weight, keep_n_of_m(nowag_scores(weight, second_moment), (2, 4)), block, block)

    def product() -> None:
        factors = start._replace(
            out_factor=start.out_factor.clone().requires_grad_(),
            core=start.core.clone().requires_grad_(),
            in_factor=start.in_factor.clone().requires_grad_(),
        )
        ((weight - reconstruct(factors)).square() * second_moment).sum().backward()

    def dense_product() -> None:
        leaves = [torch.eye(size), start.core.clone(), torch.eye(size)]
        left, core, right = (leaf.requires_grad_() for leaf in leaves)
        ((weight - left @ core @ right).square() * second_moment).sum().backward()

    seconds: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):  # in turn, so that a busy moment of the machine meets all
        seconds[0].append(
            timed(lambda: fit_armor(target, start, ArmorSettings((2, 4), ITERATIONS, 1e-2), generator)) / ITERATIONS
        )
        seconds[1].append(timed(product))
        seconds[2].append(timed(dense_product))
    iteration, blocks, dense = map(statistics.median, seconds)
    ratio = statistics.median(one / two for one, two in zip(seconds[0], seconds[1], strict=True))
    return iteration, blocks, dense, ratio


def cost_table() -> Table:
    """Return a table of timings."""
    costs = Table(title=f"one iteration beside A S B and its gradient, CPU ms, {torch.get_num_threads()} thread(s)")
    for column in ("size", "blocks", "iteration", "A S B, gradient", "ratio", "A, B as dense matrices"):
        costs.add_column(column, justify="right")
    for size, block in ((128, 32), (192, 32), (512, 128), (1024, 128)):
        iteration, blocks, dense, ratio = timings(size, block)
        costs.add_row(
            str(size), str(block), f"{1e3 * iteration:.2f}", f"{1e3 * blocks:.2f}", f"{ratio:.2f}", f"{1e3 * dense:.2f}"
        )
    return costs


def timed(function: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of calibration and groups; means are shown")
    parser.add_argument("--iterations", type=int, nargs="+", default=[0, 50, 200, 500])
    parser.add_argument("--choices", action="store_true", help="compare settings on prose-llama, with 200 iterations")
    args = parser.parse_args()
    console = Console(width=140)
    if args.choices:
        chosen = {name: armor(max_iters=200, tolerance=0.0, **settings) for name, settings in CHOICES.items()}
        methods, names = {"NoWag-P 2:4": pruner, **chosen}, ["prose-llama"]
    else:
        console.print(cost_table())
        fits = {f"ARMOR, {number} iterations": armor(max_iters=number, tolerance=0.0) for number in args.iterations}
        methods, names = {"NoWag-P 2:4": pruner, **fits}, ["embedded", "prose-llama"]
    for subject in subjects(args.shared):
        if subject.name in names:
            console.print(compare(subject, methods, args.seeds))


if __name__ == "__main__":
    main()
