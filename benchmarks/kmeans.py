"""Weighted k-means against a plain Lloyd from the same start, and against its own matrix multiplication.

python -m benchmarks.kmeans            a 1024 x 1024 matrix, d = 6, k = 4096, 100 iterations; the naive one's time is
                                       measured on 2 iterations and multiplied
python -m benchmarks.kmeans --full     the naive one runs to the end too, so that losses compare (about an hour)
python -m benchmarks.kmeans --skip_naive   without it
python -m benchmarks.kmeans --block --device cuda   all linears of a Llama-2-7B block, with the operations of their
                                       distances beside the machine's rate of a large matrix multiplication
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.naive import lloyd
from nowag_pl.functional.normalization import normalize, norms
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.kmeans_start import kmeans_plus_plus
from nowag_pl.functional.vq.nearest import CPU_CHUNK_ELEMENTS
from nowag_pl.functional.vq.quantized import SubvectorWeights, normalized_subvectors, subvectors

ROUNDS = 7
COMPILE_POINTS = 2**14
LLAMA_2_7B = ["4096x4096"] * 4 + ["11008x4096"] * 2 + ["4096x11008"]


def problem(size: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return subvectors and weights `[n, d]` of a random square matrix with heavy-tailed second moments."""
    generator = torch.Generator().manual_seed(seed)
    weight = normalize(torch.randn(size, size, generator=generator)).weight
    second_moment = torch.exp(2 * torch.randn(size, generator=generator))
    padding = (0, -size % dim)
    points = F.pad(weight, padding).reshape(-1, dim)
    weights = F.pad(second_moment, padding).view(-1, dim).repeat(size, 1)
    return points, weights


def timed(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a function's result, its wall-clock seconds and its CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def distance_product(points: torch.Tensor, weights: torch.Tensor, codebook: torch.Tensor) -> None:
    """Multiply as one assignment does, chunk by chunk, and nothing else."""
    left = torch.cat([weights, weights * points], dim=1)
    right = torch.cat([codebook.square(), -2 * codebook], dim=1).T.contiguous()
    chunk_size = CPU_CHUNK_ELEMENTS // len(codebook)
    out = torch.empty(chunk_size, len(codebook))
    for chunk in left.split(chunk_size):
        torch.mm(chunk, right, out=out[: len(chunk)])


def exact_loss(points: torch.Tensor, weights: torch.Tensor, codebook: torch.Tensor, codes: torch.Tensor) -> float:
    """Return the objective of a codebook and codes, in float64."""
    return float((weights.double() * (points.double() - codebook.double()[codes]).square()).sum())


def matmul_rate(device: str, dtype: torch.dtype, precision: str, size: int) -> float:
    """Return operations per second of a large matrix multiplication, the best of several."""
    torch.set_float32_matmul_precision(precision)
    matrix = torch.randn(size, size, device=device).to(dtype)
    seconds = [timed(lambda: synchronized(lambda: matrix @ matrix))[1] for _ in range(ROUNDS)]
    torch.set_float32_matmul_precision("highest")
    return 2 * size**3 / min(seconds)


def synchronized(function: Callable[[], Any]) -> Any:
    """Call a function and wait for what it has started on a GPU."""
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def quantize_block(args: argparse.Namespace) -> Table:
    """Quantize matrices of the shapes of a block; starts and iterations are timed apart."""
    title = (
        f"{', '.join(args.shapes)}, d = {args.dim}, k = {args.codewords}, {args.iterations} iterations, {args.device}"
    )
    table = Table("what", "seconds", "10^12 operations", "10^12 operations per second", title=title)
    start_seconds, fit_seconds, operations = 0.0, 0.0, 0
    for shape in args.shapes:
        rows, columns = (int(size) for size in shape.split("x"))
        generator = torch.Generator().manual_seed(args.seed)
        weight = torch.randn(rows, columns, generator=generator).to(args.device)
        in_scale, out_scale = norms(weight)
        points = normalized_subvectors(weight, in_scale, out_scale, args.dim)
        second_moment = torch.exp(2 * torch.randn(columns, generator=generator)).to(args.device)
        weights = SubvectorWeights(subvectors(second_moment[None], args.dim))
        arguments = (points, weights, args.codewords, generator)
        settings = KMeansSettings(args.codewords, args.iterations)
        once = KMeansSettings(args.codewords, max_iters=1)
        weighted_kmeans(points, weights, once, generator, points[: args.codewords].clone())  # compiles
        start, seconds, _ = timed(lambda: synchronized(lambda: kmeans_plus_plus(*arguments)))  # noqa: B023
        start_seconds += seconds
        fit, seconds, _ = timed(lambda: weighted_kmeans(points, weights, settings, generator, start))  # noqa: B023
        fit_seconds += seconds
        operations += (fit.num_iters + 1) * len(points) * args.codewords * 4 * args.dim
    rows_of_table = [("k-means++ starts", start_seconds, None), ("iterations", fit_seconds, operations)]
    for what, seconds, count in rows_of_table:
        measured = ("", "") if count is None else (f"{count / 1e12:.1f}", f"{count / seconds / 1e12:.3f}")
        table.add_row(what, f"{seconds:.2f}", *measured)
    rates = {
        "float32": (torch.float32, "highest"),
        "TF32": (torch.float32, "high"),
        "bfloat16": (torch.bfloat16, "highest"),
    }
    for name, (dtype, precision) in rates.items():
        rate = matmul_rate(args.device, dtype, precision, args.matmul_size)
        ratio = operations / fit_seconds / rate
        table.add_row(f"matrix multiplication, {name}", "", "", f"{rate / 1e12:.3f}: the iterations reach {ratio:.3f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the matrix")
    parser.add_argument("--dim", type=int, default=6, help="weights per codeword")
    parser.add_argument("--codewords", type=int, default=4096)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="run the naive implementation to the end")
    parser.add_argument("--skip_naive", action="store_true", help="leave the naive implementation out")
    parser.add_argument("--block", action="store_true", help="quantize all linears of a block instead")
    parser.add_argument("--device", default="cpu", help="with --block: where")
    parser.add_argument("--shapes", nargs="+", default=LLAMA_2_7B, help="with --block: the linears, out x in")
    parser.add_argument("--matmul_size", type=int, default=8192, help="with --block: rows of the multiplied matrices")
    args = parser.parse_args()
    console = Console(width=120)
    if args.block:
        console.print(quantize_block(args))
        return

    points, weights = problem(args.size, args.dim, args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    small = points[:COMPILE_POINTS], weights[:COMPILE_POINTS]
    compiled = timed(lambda: weighted_kmeans(*small, KMeansSettings(min(args.codewords, len(small[0])), 0), generator))
    start, start_wall, start_cpu = timed(lambda: kmeans_plus_plus(points, weights, args.codewords, generator))
    products, fits = [], []
    for _ in range(ROUNDS):  # in turn, so that a busy moment of the machine meets both
        products.append(timed(lambda: distance_product(points, weights, start))[1:])
        fits.append(
            timed(
                lambda: weighted_kmeans(points, weights, KMeansSettings(args.codewords, 3), generator, codebook=start)
            )[1:]
        )
    product_wall, product_cpu = torch.tensor(products).median(dim=0).values.tolist()
    iteration_wall, iteration_cpu = (torch.tensor(fits).median(dim=0).values / 4).tolist()  # 3 updates, 4 assignments
    ours, our_wall, our_cpu = timed(
        lambda: weighted_kmeans(
            points, weights, KMeansSettings(args.codewords, args.iterations), generator, codebook=start
        )
    )
    our_loss = exact_loss(points, weights, ours.codebook, ours.codes)
    table = Table(
        title=f"{args.size} x {args.size}, d = {args.dim}, k = {args.codewords}, {args.iterations} iterations, "
        f"{torch.get_num_threads()} threads"
    )
    for column in ("what", "seconds", "CPU seconds", "s per iteration", "ratio to the product", "loss"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows = [
        ("matrix multiplication of one assignment", product_wall, product_cpu, product_wall, None),
        ("a small fit, which compiles", *compiled[1:], None, None),
        ("k-means++ start", start_wall, start_cpu, None, None),
        ("10 iterations", 10 * iteration_wall, 10 * iteration_cpu, iteration_wall, None),
        (f"nowag_pl, {ours.num_iters} iterations", our_wall, our_cpu, iteration_wall, our_loss),
    ]
    if not args.skip_naive:
        naive_iterations = args.iterations if args.full else 2
        naive, naive_wall, naive_cpu = timed(lambda: lloyd(points, weights, start, naive_iterations))
        naive_loss = exact_loss(points, weights, *naive) if args.full else None
        scale = args.iterations / naive_iterations
        measured = "" if args.full else " (2 measured)"
        naive_times = (naive_wall * scale, naive_cpu * scale, naive_wall / naive_iterations)
        rows.append((f"naive, {args.iterations} iterations{measured}", *naive_times, naive_loss))
    for what, wall, cpu, per_iteration, loss in rows:
        table.add_row(
            what,
            f"{wall:.2f}",
            f"{cpu:.2f}",
            "" if per_iteration is None else f"{per_iteration:.3f}",
            "" if per_iteration is None else f"{per_iteration / product_wall:.2f}",
            "" if loss is None else f"{loss:.5f}",
        )
    console.print(table)
    if not args.skip_naive:
        console.print(f"CPU time, naive / nowag_pl: {naive_cpu * scale / our_cpu:.1f}")
    if not args.skip_naive and args.full:
        console.print(f"loss, nowag_pl / naive: {our_loss / naive_loss:.8f}")


if __name__ == "__main__":
    main()
