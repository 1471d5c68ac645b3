"""Run the Triton kernels on a CPU in Triton's interpreter and print matrix and product of all cases as JSON."""

import json
import sys

import torch

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.kernels.cuda.trellis_matmul import decode, multiply


def tiles_problem(code, state_bits, bits, in_tiles, out_tiles, num_tokens, device="cpu"):
    """Tokens, random streams, and the numbers of the states."""
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(-(2**15), 2**15, (in_tiles, out_tiles, 16 * bits), generator=generator, dtype=torch.int16)
    tokens = torch.randn(num_tokens, 16 * in_tiles, generator=generator)
    return tokens.to(device), packed.to(device), code_values(code, state_bits).to(device)


if __name__ == "__main__":
    found = []
    for case in json.loads(sys.argv[1]):
        tokens, packed, values = tiles_problem(*case)
        product = multiply(tokens, packed, values, case[2], case[0] == "mul1")
        found.append([decode(packed, values, case[2]).tolist(), product.tolist()])
    print(json.dumps(found))
