"""Run the Triton kernel on a CPU in Triton's interpreter and print the relative errors of its products as JSON."""

import json
import sys

import torch
from vq_oracle import problem

from nowag_pl.kernels.cuda.vq import fused_matmul

if __name__ == "__main__":
    errors = []
    for *shape, dtype in json.loads(sys.argv[1]):
        case = problem(*shape, dtype=getattr(torch, dtype))
        errors.append(case.error(fused_matmul(*case)))
    print(json.dumps(errors))
