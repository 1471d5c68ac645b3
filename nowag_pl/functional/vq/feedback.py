"""Codes of a vector-quantized weight, chosen with feedback from the errors of other columns.

The error that counts is that of the linear's output, `sum_i (w_i - q_i) H (w_i - q_i)^T` over the rows i, where H is
the mean of x x^T and `q_i` a row of the reconstruction `r2_i codebook[codes_i] r1` (NoWag-VQ, arXiv:2504.14569). Codes
are chosen a subvector column at a time:

- :func:`feedback_codes` goes from the first column to the last, and moves the error of each into those behind it (GPTQ,
  arXiv:2210.17323, with a subvector for a column);
- :func:`sweep_codes` starts from codes, and chooses each column anew given what all others have become; it never makes
  the error larger.

Both compare a subvector w with a codeword c by `(w - c) D (w - c)^T`, with a matrix D for each column.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.alternating import alternating_codes
from nowag_pl.functional.moments import damped_inverse_factor, output_error
from nowag_pl.functional.vq.nearest import CPU_CHUNK_ELEMENTS, CUDA_CHUNK_ELEMENTS, row_minima
from nowag_pl.functional.vq.quantized import Quantized, columns
from nowag_pl.functional.vq.refit import refit_codebook, refit_in_scale, refit_out_scale


def refine(
    weight: Float[Tensor, "out in"],
    start: Quantized,
    second_moment: Float[Tensor, "in in"],
    update: Literal["feedback", "alternating"] | None,
    num_rounds: int,
    refit_scales: bool,
    damping: float,
) -> Quantized:
    """Lower the output error of a quantized weight, at the same number of bits.

    A round chooses the codes (the first one as `update` says, the others by :func:`sweep_codes`) and fits the codebook,
    and perhaps the scales, to them by least squares.

    Args:
        weight: dense weight W.
        start: quantized weight.
        second_moment: H, mean of x x^T.
        update: how the first round chooses codes: "feedback" by :func:`feedback_codes`, "alternating" by
            :func:`~nowag_pl.functional.alternating.alternating_codes`. None leaves codes and codebook as they are.
        num_rounds: rounds; without an update there is one, of scales alone.
        refit_scales: whether to fit both scales.
        damping: what is added to the diagonal of H, as a share of its mean.

    Returns:
        The quantized weight of the smallest output error, measured with the damped H, the start among them.

    Raises:
        ValueError: H cannot be inverted.
    """
    weight = weight.float()
    damped, factor = damped_inverse_factor(second_moment, damping)
    best, least = start, _total_error(weight, start, damped)
    current = start
    for number in range(num_rounds if update else 1):
        if update:
            if number > 0:
                current = current._replace(codes=sweep_codes(weight, current, damped))
            elif update == "feedback":
                current = current._replace(codes=feedback_codes(weight, current, factor))
            else:
                current = alternating_codes(weight, current, damped)
            current = current._replace(codebook=refit_codebook(weight, *current, damped))
        if refit_scales:
            current = current._replace(out_scale=refit_out_scale(weight, *current, damped))
            current = current._replace(in_scale=refit_in_scale(weight, *current, damped))
        error = _total_error(weight, current, damped)
        if error < least:
            best, least = current, error
    return best


def feedback_codes(
    weight: Float[Tensor, "out in"], quantized: Quantized, factor: Float[Tensor, "in in"]
) -> Int[Tensor, "out groups"]:
    """Choose all codes, first column first, each for what the errors of those before make of its subvectors.

    Args:
        weight: dense weight W.
        quantized: codebook and scales; its codes do not count.
        factor: upper triangular U with `U^T U` the inverse of H.

    Returns:
        Codes `[out, groups]`, int64.
    """
    codebook, _, in_scale, out_scale = quantized
    target, codes = weight.clone(), []
    for start, stop in columns(weight.shape[1], codebook.shape[1]):
        inverse = torch.linalg.solve_triangular(
            factor[start:stop, start:stop], torch.eye(stop - start, device=weight.device), upper=True
        )
        codewords = codebook[:, : stop - start] * in_scale[start:stop]
        metric = inverse @ inverse.T
        code = _nearest(target[:, start:stop] @ metric, codewords, metric, out_scale)
        error = (target[:, start:stop] - codewords[code] * out_scale[:, None]) @ inverse
        target[:, stop:] -= error @ factor[start:stop, stop:]
        codes.append(code)
    return torch.stack(codes, dim=1)


def sweep_codes(
    weight: Float[Tensor, "out in"], quantized: Quantized, second_moment: Float[Tensor, "in in"]
) -> Int[Tensor, "out groups"]:
    """Choose the codes of one column after the other, each for the best given those of all others.

    Args:
        weight: dense weight W.
        quantized: codebook, codes to start from, and scales.
        second_moment: H, mean of x x^T.

    Returns:
        Codes `[out, groups]`, int64.
    """
    codebook, codes, in_scale, out_scale = quantized
    codes = codes.clone()
    pull = (weight - quantized.weight) @ second_moment  # [out, in], what the errors do to each column
    for group, (start, stop) in enumerate(columns(weight.shape[1], codebook.shape[1])):
        codewords = codebook[:, : stop - start] * in_scale[start:stop]
        metric = second_moment[start:stop, start:stop]
        before = codewords[codes[:, group]] * out_scale[:, None]
        codes[:, group] = _nearest(before @ metric + pull[:, start:stop], codewords, metric, out_scale)
        change = codewords[codes[:, group]] * out_scale[:, None] - before
        pull -= change @ second_moment[start:stop]
    return codes


def _nearest(products: Tensor, codewords: Tensor, metric: Tensor, out_scale: Tensor) -> Tensor:
    """Return the c that minimises `r2 c D c^T - 2 w D c^T` for every row.

    Args:
        products: `w D`, `[out, d]`.
        codewords: c without the rows' scales, `[k, d]`.
        metric: D, `[d, d]`.
        out_scale: r2, `[out]`. A row with scale 0 takes any codeword.
    """
    points = products / torch.where(out_scale == 0, torch.ones_like(out_scale), out_scale)[:, None]
    offset = ((codewords @ metric) * codewords).sum(dim=1)
    elements = CPU_CHUNK_ELEMENTS if points.device.type == "cpu" else CUDA_CHUNK_ELEMENTS
    chunks = points.split(max(elements // len(codewords), 1))
    return torch.cat([row_minima(torch.addmm(offset, chunk, codewords.T, alpha=-2))[1] for chunk in chunks])


def _total_error(weight: Tensor, quantized: Quantized, second_moment: Tensor) -> float:
    return float(output_error(weight, quantized.weight, second_moment).sum(dtype=torch.float64))
