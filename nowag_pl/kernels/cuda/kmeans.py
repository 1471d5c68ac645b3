"""The nearest codeword of many points on CUDA, on tensor cores and without writing distances.

A program holds some points and goes through the codewords a tile at a time: products `[w, w x] . [c^2, -2 c]` are
computed in three TF32 parts, the smallest and the second smallest of each column of tiles stay in registers. Where the
two smallest of all are closer than the error of the products, the point is looked at again in exact float32. Triton
comes with the CUDA builds of PyTorch; with TRITON_INTERPRET=1 the kernel runs on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Of one program, whose 128 registers hold them without spilling.
_POINTS, _CODEWORDS = 64, 32
# Smallest side that tl.dot takes.
_MIN_DOT = 16
# Error of a product of three TF32 parts, as a share of the sum of its terms' sizes, with some reserve.
_ERROR = 2.0**-18


def find_nearest(
    features: Float[Tensor, "n width"],
    codeword_features: Float[Tensor, "width k"],
    codes: Int[Tensor, " n"],
    distances: Float[Tensor, " n"],
) -> None:
    """Write the codeword with the smallest product for each point; of equal ones, the first.

    Args:
        features: w and w x of each point, w not negative.
        codeword_features: c^2 and -2 c, as columns.
        codes: where the codewords go, int32.
        distances: where their products go.
    """
    doubtful = find_by_tensor_cores(features, codeword_features, codes, distances).nonzero().squeeze(1)
    if len(doubtful):
        again = features[doubtful]
        exact_codes, exact_distances = codes.new_empty(len(again)), distances.new_empty(len(again))
        _launch(again, codeword_features, exact_codes, exact_distances, "ieee")
        codes[doubtful], distances[doubtful] = exact_codes, exact_distances


def find_by_tensor_cores(
    features: Float[Tensor, "n width"],
    codeword_features: Float[Tensor, "width k"],
    codes: Int[Tensor, " n"],
    distances: Float[Tensor, " n"],
) -> Bool[Tensor, " n"]:
    """As :func:`find_nearest`, but return which points have two codewords that are too close to distinguish.

    Args:
        features: w and w x of each point, w not negative.
        codeword_features: c^2 and -2 c, as columns.
        codes: where the codewords go, int32.
        distances: where their products go.
    """
    return _launch(features, codeword_features, codes, distances, "tf32x3")


def _launch(features: Tensor, codeword_features: Tensor, codes: Tensor, distances: Tensor, precision: str) -> Tensor:
    """Run the kernel with a precision of products that `tl.dot` knows; return which points are doubtful."""
    num_points, width = features.shape
    doubtful = torch.empty(num_points, dtype=torch.bool, device=features.device)
    # Triton launches on the current device.
    with torch.cuda.device_of(features):
        _kernel[(triton.cdiv(num_points, _POINTS),)](
            features.contiguous(),
            codeword_features.contiguous(),
            codes,
            distances,
            doubtful,
            num_points,
            codeword_features.shape[1],
            DIM=width // 2,
            WIDTH=max(triton.next_power_of_2(width), _MIN_DOT),
            POINTS=_POINTS,
            CODEWORDS=_CODEWORDS,
            PRECISION=precision,
            ERROR=_ERROR,
            enable_fp_fusion=True,  # multiply and add in one instruction
        )
    return doubtful


@triton.jit
@no_type_check  # Triton compiles the plain function
def _kernel(
    features_ptr,  # [n, 2 d]
    codewords_ptr,  # [2 d, k]
    codes_ptr,  # int32 [n]
    distances_ptr,  # [n]
    doubtful_ptr,  # bool [n]
    num_points,
    num_codewords,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # 2 d, filled up
    POINTS: tl.constexpr,
    CODEWORDS: tl.constexpr,
    PRECISION: tl.constexpr,
    ERROR: tl.constexpr,
):
    points = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    columns, inside = tl.arange(0, WIDTH), points < num_points
    rows = features_ptr + points.to(tl.int64)[:, None] * (2 * DIM)
    features = tl.load(rows + columns[None, :], mask=inside[:, None] & (columns < 2 * DIM)[None, :], other=0)
    smallest = tl.full((POINTS, CODEWORDS), float("inf"), tl.float32)
    second = tl.full((POINTS, CODEWORDS), float("inf"), tl.float32)
    where = tl.zeros((POINTS, CODEWORDS), tl.int32)
    for start in range(0, num_codewords, CODEWORDS):
        index = start + tl.arange(0, CODEWORDS)
        real = index < num_codewords
        offsets = columns[:, None] * num_codewords + index[None, :]
        codewords = tl.load(codewords_ptr + offsets, mask=(columns < 2 * DIM)[:, None] & real[None, :], other=0)
        products = tl.dot(features, codewords, input_precision=PRECISION)
        products = tl.where(real[None, :], products, float("inf"))
        second = tl.minimum(second, tl.maximum(smallest, products))
        where = tl.where(products < smallest, index[None, :], where)
        smallest = tl.minimum(smallest, products)
    nearest = tl.min(smallest, axis=1)
    code = tl.min(tl.where(smallest == nearest[:, None], where, num_codewords), axis=1)
    runner_up = tl.min(tl.where(where == code[:, None], second, smallest), axis=1)
    mask = inside[:, None] & (columns < DIM)[None, :]
    weights = tl.load(rows + columns[None, :], mask=mask, other=0)
    moments = tl.load(rows + DIM + columns[None, :], mask=mask, other=0)
    size = tl.sum(moments * moments / tl.where(weights > 0, weights, 1), axis=1)  # sum_j w x^2
    # |w c^2| + |2 w x c| is at most 5 w x^2 + 3 w (x - c)^2
    bound = ERROR * (10 * size + 6 * tl.maximum(runner_up + size, 0))
    tl.store(codes_ptr + points, tl.minimum(code, num_codewords - 1), mask=inside)
    tl.store(distances_ptr + points, nearest, mask=inside)
    tl.store(doubtful_ptr + points, runner_up - nearest <= bound, mask=inside)
