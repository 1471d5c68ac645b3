"""Error and speed of the trellis on unit Gaussian numbers, tail-biting, on one thread.

python -m benchmarks.trellis                      every code at 2 bits, `mul1` at 1 to 4, for 8, 12 and 16 state bits
python -m benchmarks.trellis --sequences 64       fewer numbers: the error's spread grows to 1 %
"""

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.paths import tail_biting_path
from nowag_pl.functional.trellis.quantize import SPREAD

PUBLISHED = {  # QTIP's table of random numbers, T = 256; at 2 bits also for other states
    (1, 12): 0.2803,
    (2, 8): 0.083,
    (2, 12): 0.0733,
    (2, 16): 0.0703,
    (3, 12): 0.0198,
    (4, 12): 0.0055,
}
CASES = [("mul1", bits) for bits in (1, 2, 3, 4)] + [(code, 2) for code in ("mcg", "3inst", "1mad", "table")]


def measure(code: str, bits: int, state_bits: int, targets: torch.Tensor) -> tuple[float, float]:
    """Return the relative mean squared error, and the weights of a second of one core."""
    values = code_values(code, state_bits)
    values = values * SPREAD[bits - 1] / values.std()
    tail_biting_path(targets[:1], values, bits)
    start = time.thread_time()
    path = tail_biting_path(targets, values, bits)
    seconds = time.thread_time() - start
    error = (targets - values[path.long()]).square().mean() / targets.square().mean()
    return float(error), targets.numel() / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sequences", type=int, default=400, help="sequences of 256; an eighth of them at 16 state bits"
    )
    parser.add_argument("--state_bits", type=int, nargs="+", default=[8, 12, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    targets = torch.randn(arguments.sequences, 256, generator=torch.Generator().manual_seed(0))
    table = Table("code", "L", "k", "error", "published", "weights/s/core")
    for state_bits in arguments.state_bits:
        few = targets[: max(len(targets) // 8, 1)] if state_bits > 14 else targets
        for code, bits in CASES:
            error, speed = measure(code, bits, state_bits, few)
            published = PUBLISHED.get((bits, state_bits))
            row = code, state_bits, bits, f"{error:.5f}", f"{published or '-'}", f"{speed:,.0f}"
            table.add_row(*map(str, row))
    Console().print(table)


if __name__ == "__main__":
    main()
