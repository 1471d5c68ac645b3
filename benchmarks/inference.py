"""How fast do compressed linears run beside dense ones?

python -m benchmarks.inference [--device cpu] [--shapes 4096x4096 11008x4096 4096x11008] [--quick]
python -m benchmarks.inference --crossover     up to how many tokens vq_matmul beats the reconstructed weight

Decodes 1, 4 and 16 tokens and prefills 2048, by linears of Llama-2-7B's shapes. Dense weights are bfloat16 and float32
on a CPU, float16 on CUDA. Linears have up to eight copies that are used in turn, so that, as in a model, few are in the
cache when they are used; dense and compressed take turns, so that a busy moment of the machine meets both, and the
time that a fifth of the calls stays under is shown. Bandwidth: the bytes of a weight over the time, beside that of a
copy in the same run. With --threads 1 on a CPU, the time is that which the thread runs. Values are random.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from math import ceil
from statistics import quantiles
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nowag_pl import accelerate
from nowag_pl.functional.armor.objective import identity_factors
from nowag_pl.functional.vq.matmul import is_for_few_tokens, vq_matmul
from nowag_pl.modules import ArmorLinear, CompressedLinear, MaskedLinear, VQLinear

SHAPES = ["4096x4096", "11008x4096", "4096x11008"]  # out x in
TOKENS = [1, 4, 16, 2048]
CODEBOOKS = [(6, 4096), (4, 256)]  # d, k: both 2 bits
ARMOR_BLOCK = 128
CACHE_BYTES = {"cpu": 300 * 2**20, "cuda": 100 * 2**20}  # at least as much lies between two uses of a linear
MAX_COPIES = 8
ACCELERATED = "accelerated"


def clock() -> float:
    """Return seconds: of this thread's own work where it alone works, so that a busy machine counts for less."""
    return time.thread_time() if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter()


def typical(seconds: list[float]) -> float:
    """Return the fastest fifth's bound: what others do on the machine only ever adds."""
    return quantiles(seconds, n=5)[0]


class Contender(NamedTuple):
    """A linear that takes part."""

    name: str
    copies: Iterator[nn.Module]
    weight_bytes: int  # in memory
    dtype: torch.dtype

    def time(self, activations: Tensor) -> float:
        """Return the seconds of one call."""
        linear = next(self.copies)
        synchronize(activations.device)
        start = clock()
        linear(activations)
        synchronize(activations.device)
        return clock() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        synchronize(device)
        start = clock()
        target.copy_(source)
        synchronize(device)
        seconds.append(clock() - start)
    return 2 * source.nbytes / typical(seconds[1:])


def vector_quantized(shape: tuple[int, int], dim: int, size: int, dtype: torch.dtype) -> VQLinear:
    codes = torch.randint(size, (shape[0], ceil(shape[1] / dim)), dtype=torch.int32)
    scales = torch.rand(shape[1]) + 0.5, torch.rand(shape[0]) + 0.5
    return VQLinear(torch.randn(size, dim) / shape[1] ** 0.5, codes, *scales, dtype=dtype)


def half_kept(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a weight and a mask of pattern 2:4."""
    keep = torch.tensor([True, False, False, True]).repeat(shape[0], shape[1] // 4)
    return torch.randn(shape) / shape[1] ** 0.5, keep


def half_pruned(shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    weight, keep = half_kept(shape)
    return MaskedLinear(weight.to(dtype), keep, pattern=(2, 4))


def armor(shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    return ArmorLinear(identity_factors(*half_kept(shape), ARMOR_BLOCK, ARMOR_BLOCK), (2, 4), dtype=dtype)


def contenders(shape: tuple[int, int], device: torch.device) -> list[Contender]:
    """Return dense linears, the first of which is the yardstick, and compressed ones."""
    first = torch.float16 if device.type == "cuda" else torch.bfloat16
    made: list[tuple[str, torch.dtype, Callable[[], nn.Module]]] = []
    for dtype in (first,) if device.type == "cuda" else (first, torch.float32):
        name = str(dtype).removeprefix("torch.")
        made.append((f"dense {name}", dtype, lambda dtype=dtype: nn.Linear(*shape[::-1], bias=False, dtype=dtype)))
    for dim, size in CODEBOOKS:
        name = f"VQ d = {dim}, k = {size}"
        made.append((name, first, lambda dim=dim, size=size: vector_quantized(shape, dim, size, first)))
        if device.type == "cpu":
            made.append((f"{name}, {ACCELERATED}", *made[-1][1:]))
    if device.type == "cuda":
        made.append((f"2:4, {ACCELERATED}", first, lambda: half_pruned(shape, first)))
        made.append((f"ARMOR 2:4, {ACCELERATED}", first, lambda: armor(shape, first)))
    return [contender(name, dtype, make, device) for name, dtype, make in made]


def contender(name: str, dtype: torch.dtype, make: Callable[[], nn.Module], device: torch.device) -> Contender:
    def ready() -> nn.Module:
        module = nn.Sequential(make()).to(device).eval().requires_grad_(False)
        if name.endswith(ACCELERATED):
            accelerate(module)
        return module[0]

    linear = ready()
    weight_bytes = held_bytes(linear)
    num_copies = min(ceil(CACHE_BYTES[device.type] / weight_bytes) + 1, MAX_COPIES)
    return Contender(name, cycle([linear, *(ready() for _ in range(num_copies - 1))]), weight_bytes, dtype)


def held_bytes(linear: nn.Module) -> int:
    """Return the bytes of a linear in memory."""
    if isinstance(linear, CompressedLinear):
        return linear.held_bytes
    return sum(parameter.nbytes for parameter in linear.parameters())


def compare(table: Table, shape: tuple[int, int], tokens: list[int], device: torch.device, rounds: int) -> None:
    """Add the rows of a shape."""
    rivals = contenders(shape, device)
    bandwidth = copy_bandwidth(device)
    for num_tokens in tokens:
        inputs = {rival.name: torch.randn(num_tokens, shape[1], device=device).to(rival.dtype) for rival in rivals}
        seconds: dict[str, list[float]] = {rival.name: [] for rival in rivals}
        for number in range(2 + (rounds if num_tokens <= 16 else max(rounds // 8, 3))):
            for rival in rivals:
                taken = rival.time(inputs[rival.name])
                if number >= 2:  # what is compiled is compiled in the first two
                    seconds[rival.name].append(taken)
        yardstick = typical(seconds[rivals[0].name])
        for rival in rivals:
            taken = typical(seconds[rival.name])
            rate = rival.weight_bytes / taken
            table.add_row(
                "x".join(map(str, shape)),
                str(num_tokens),
                rival.name,
                f"{taken * 1e3:.2f}",
                f"{yardstick / taken:.2f}",
                f"{rival.weight_bytes / rivals[0].weight_bytes:.2f}",
                f"{rate / 1e9:.2f}" if num_tokens <= 16 else "",
                f"{rate / bandwidth:.2f}" if num_tokens <= 16 else "",
            )
        table.add_section()


def crossover(shape: tuple[int, int], device: torch.device, rounds: int) -> Table:
    """Compare vq_matmul with the reconstructed weight for growing numbers of tokens."""
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    table = Table(title=f"vq_matmul against the reconstructed weight, {shape[0]}x{shape[1]}, {device}")
    for column in ("d, k", "tokens", "vq_matmul ms", "reconstructed ms", "ratio", "chosen"):
        table.add_column(column, justify="right")
    for dim, size in CODEBOOKS:
        linear = vector_quantized(shape, dim, size, dtype).to(device).requires_grad_(False)
        parts = (linear.codes, linear.codebook, linear.in_scale, linear.out_scale)
        for num_tokens in (1, 16, 64, 128, 256, 512, 1024, 2048):
            inputs = torch.randn(num_tokens, shape[1], device=device).to(dtype)
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(rounds + 2):
                for taken, function in zip(
                    seconds,
                    (lambda: vq_matmul(inputs, *parts), lambda: nn.functional.linear(inputs, linear.weight)),  # noqa: B023
                    strict=True,
                ):
                    synchronize(device)
                    start = clock()
                    function()
                    synchronize(device)
                    taken.append(clock() - start)
            fused, dense = (typical(taken[2:]) for taken in seconds)
            chosen = "vq_matmul" if is_for_few_tokens(num_tokens, device) else "reconstructed"
            figures = (f"{fused * 1e3:.2f}", f"{dense * 1e3:.2f}", f"{dense / fused:.2f}")
            table.add_row(f"{dim}, {size}", str(num_tokens), *figures, chosen)
    return table


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="out x in")
    parser.add_argument("--quick", action="store_true", help="the first shape, no prefill, few rounds")
    parser.add_argument("--crossover", action="store_true", help="measure the crossover instead")
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    device, rounds = torch.device(args.device), 7 if args.quick else args.rounds
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes[: 1 if args.quick else None]]
    console = Console(width=120)
    if args.crossover:
        console.print(crossover(shapes[0], device, 3))
        return
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table(title=f"{title}, copy {copy_bandwidth(device) / 1e9:.1f} GB/s")
    for column in ("out x in", "tokens", "linear", "ms", "speed", "memory", "GB/s of weights", "of the copy"):
        table.add_column(column, justify="left" if column in {"out x in", "linear"} else "right")
    for shape in shapes:
        compare(table, shape, TOKENS[:-1] if args.quick else TOKENS, device, rounds)
    console.print(table)
    console.print("speed and memory: as a multiple of the first row of a group")


if __name__ == "__main__":
    main()
