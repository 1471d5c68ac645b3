"""Run the Triton kernels on a CPU in Triton's interpreter and print the states of all cases as JSON."""

import json
import sys

import torch

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.kernels.cuda.trellis import find_path


def trellis_problem(state_bits, bits, count, steps, weighted, bounded, device="cpu"):
    """Arguments of `find_path`, such that the ends can be reached."""
    generator = torch.Generator().manual_seed(state_bits)
    targets = torch.randn(count, steps, generator=generator)
    roots = torch.rand(count, steps, generator=generator) if weighted else None
    bounds = torch.randint(0, 2 ** (state_bits - bits), (2, count), generator=generator, dtype=torch.int32)
    starts, ends = bounds if bounded else (None, None)
    tensors = targets, roots, code_values("mul1", state_bits), starts, ends
    targets, roots, values, starts, ends = (None if each is None else each.to(device) for each in tensors)
    return targets, roots, values, bits, starts, ends


if __name__ == "__main__":
    print(json.dumps([find_path(*trellis_problem(*case)).tolist() for case in json.loads(sys.argv[1])]))
