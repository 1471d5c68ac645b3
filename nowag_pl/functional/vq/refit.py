"""Least-squares fits of scales and codebook to the output of the dense linear.

Each lowers `sum_i (w_i - q_i) H (w_i - q_i)^T`, H the mean of x x^T, over one part of the reconstruction
`q_i = r2_i codebook[codes_i] r1` (NoWag-VQ, arXiv:2504.14569) with the rest held fixed; or `tr(H_O E H E^T)`, where the
final loss couples the outputs.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.least_squares import conjugate_gradients
from nowag_pl.functional.scale_fits import fit_in_scale, fit_out_scale
from nowag_pl.functional.vq.quantized import Quantized, joined, subvectors

CODEBOOK_STEPS = 10


def refit_out_scale(
    weight: Float[Tensor, "out in"],
    quantized: Quantized,
    second_moment: Float[Tensor, "in in"],
    output_moment: Tensor | None = None,
) -> Float[Tensor, " out"]:
    """Return the best r2, `(v_i H w_i^T) / (v_i H v_i^T)` with `v_i = codebook[codes_i] r1`.

    Args:
        weight: dense weight W.
        quantized: codebook, codes and scales; r2 is kept where v_i makes no output.
        second_moment: H, mean of x x^T.
        output_moment: H_O; None for the identity.
    """
    _, _, in_scale, out_scale = quantized
    return fit_out_scale(weight, quantized.normalized, in_scale, out_scale, second_moment, output_moment)


def refit_in_scale(
    weight: Float[Tensor, "out in"],
    quantized: Quantized,
    second_moment: Float[Tensor, "in in"],
    output_moment: Tensor | None = None,
) -> Float[Tensor, " in"]:
    """Return the best r1: the solution of `(V^T V * H) r1 = diag(V^T W H)` with `V = r2 codebook[codes]`.

    Args:
        weight: dense weight W.
        quantized: codebook, codes and scales; the solution stays near r1 where it makes no difference.
        second_moment: H, mean of x x^T.
        output_moment: H_O; None for the identity.
    """
    _, _, in_scale, out_scale = quantized
    return fit_in_scale(weight, quantized.normalized, in_scale, out_scale, second_moment, output_moment)


def refit_codebook(
    weight: Float[Tensor, "out in"],
    quantized: Quantized,
    second_moment: Float[Tensor, "in in"],
    output_moment: Tensor | None = None,
) -> Float[Tensor, "k d"]:
    """Return a codebook with less output error, by a few steps of conjugate gradients.

    Args:
        weight: dense weight W.
        quantized: codebook to start from, codes and scales. Codewords that no subvector uses stay.
        second_moment: H, mean of x x^T.
        output_moment: H_O; None for the identity.
    """
    codebook, codes, in_scale, out_scale = quantized

    def expand(codewords: Tensor) -> Tensor:  # [k, d] to [out, in]
        return joined(codewords[codes], len(in_scale)) * in_scale * out_scale[:, None]

    # The transpose of `expand`, except for the scales.
    def collect(matrix: Tensor) -> Tensor:  # [out, in] to [k, d]
        return torch.zeros_like(codebook).index_add_(0, codes.flatten(), subvectors(matrix, codebook.shape[1]))

    def priced(matrix: Tensor) -> Tensor:
        return matrix @ second_moment if output_moment is None else output_moment @ matrix @ second_moment

    scales = in_scale * out_scale[:, None]
    rows = torch.ones_like(out_scale) if output_moment is None else output_moment.diagonal()
    return conjugate_gradients(
        codebook,
        collect(priced(weight - expand(codebook)) * scales),
        lambda step: collect(priced(expand(step)) * scales),
        collect(rows[:, None] * second_moment.diagonal() * scales.square()),
        lambda left, right: (left * right).sum(),
        CODEBOOK_STEPS,
    )
