"""Codes of a vector-quantized weight, chosen for the linear's output.

The error that counts is `sum_i (w_i - q_i) H (w_i - q_i)^T` over the rows i, where H is the mean of x x^T and `q_i` a
row of the reconstruction `r2_i codebook[codes_i] r1` (NoWag-VQ, arXiv:2504.14569). Codes are chosen

- with error feedback (:mod:`nowag_pl.functional.feedback`), a column of subvectors after the other;
- together with the codebook by alternating directions (:mod:`nowag_pl.functional.alternating`), with a step of k-means
  for a projection;
- with feedback along both sides where the final loss couples the outputs: the error is `tr(H_O E H E^T)` then;
- in sweeps that start from codes, and choose each column again given all others; they never increase the error.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.functional.alternating import Alternation, alternate
from nowag_pl.functional.feedback import Side, column_blocks, quantize_two_sided, quantize_with_feedback
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.nearest import chunk_elements, row_minima
from nowag_pl.functional.vq.quantized import Quantized, grouped, subvectors

CODES = Alternation(num_steps=60, growth=1.04)


def feedback_codes(
    weight: Float[Tensor, "out in"], quantized: Quantized, factor: Float[Tensor, "in in"]
) -> Int[Tensor, "out groups"]:
    """Choose all codes, first column first, each for its subvectors and the errors of those before.

    Args:
        weight: dense weight W.
        quantized: codebook and scales; its codes do not count.
        factor: upper triangular U with `U^T U` the inverse of H.

    Returns:
        Codes `[out, groups]`, int64.
    """
    codes: list[Tensor] = []

    def nearest(columns: slice, target: Tensor, metric: Tensor) -> Tensor:
        codewords = quantized.codewords(columns)
        codes.append(_nearest(target @ metric, codewords, metric, quantized.out_scale))
        return codewords[codes[-1]] * quantized.out_scale[:, None]

    quantize_with_feedback(weight, factor, quantized.codebook.shape[1], nearest)
    return torch.stack(codes, dim=1)


def two_sided_codes(
    weight: Float[Tensor, "out in"],
    quantized: Quantized,
    out_factor: Float[Tensor, "out out"],
    factor: Float[Tensor, "in in"],
) -> Int[Tensor, "out groups"]:
    """Choose all codes, each for its subvector and the errors of those to its left and above it.

    Args:
        weight: dense weight W.
        quantized: codebook and scales; its codes do not count.
        out_factor: upper triangular U with `U^T U` the inverse of H_O.
        factor: the same of H.

    Returns:
        Codes `[out, groups]`, int64.
    """
    dim, padding = quantized.codebook.shape[1], -weight.shape[1] % quantized.codebook.shape[1]
    # What a row is padded with is coupled to nothing, and its codewords are zero.
    padded = torch.block_diag(factor, torch.eye(padding, device=factor.device))
    columns = Side.of(padded, dim)
    scales = grouped(quantized.in_scale, dim)  # [groups, d]
    codewords = quantized.codebook * scales[:, None]  # [groups, k, d]
    priced = codewords @ columns.metrics  # c M
    offsets = (priced * codewords).sum(dim=2)  # [groups, k]
    out_scale = torch.where(quantized.out_scale == 0, torch.ones_like(quantized.out_scale), quantized.out_scale)
    codes = torch.empty(len(weight), len(scales), dtype=torch.int64, device=weight.device)

    def nearest(row: Tensor, column: Tensor, targets: Tensor) -> Tensor:
        points = targets / out_scale[row, None, None]  # [n, 1, d]
        costs = torch.baddbmm(offsets[column][:, None], points, priced[column].mT, alpha=-2)  # [n, 1, k]
        codes[row, column] = costs.argmin(dim=2)[:, 0]
        return (codewords[column, codes[row, column]] * quantized.out_scale[row, None])[:, None]

    quantize_two_sided(F.pad(weight, (0, padding)), Side.of(out_factor, 1), columns, nearest)
    return codes


def alternating_codes(
    weight: Float[Tensor, "out in"],
    start: Quantized,
    second_moment: Float[Tensor, "in in"],
    settings: Alternation = CODES,
) -> Quantized:
    """Choose codes and codebook together; the scales stay.

    Args:
        weight: dense weight W.
        start: quantized weight.
        second_moment: H, mean of x x^T, positive definite.
        settings: steps and penalties.
    """
    dim = start.codebook.shape[1]
    scales = start.in_scale * torch.where(start.out_scale == 0, 1, start.out_scale)[:, None]
    scales = torch.where(scales == 0, 1, scales)
    weights = scales.square() * second_moment.diagonal()
    weights = subvectors(weights / weights.mean(), dim)
    step = KMeansSettings(len(start.codebook), max_iters=1)
    current = start

    def project(target: Tensor) -> Tensor:
        nonlocal current
        points = subvectors(target / scales, dim)
        fit = weighted_kmeans(points, weights, step, torch.Generator(), current.codebook)
        current = current._replace(codebook=fit.codebook, codes=fit.codes.view_as(current.codes))
        return current.weight

    alternate(weight.float(), second_moment, project, settings)
    return current


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
    codes, out_scale = quantized.codes.clone(), quantized.out_scale
    # How the errors of all columns pull at each column.
    pull = (weight - quantized.weight) @ second_moment  # [out, in]
    for group, columns in enumerate(column_blocks(weight.shape[1], quantized.codebook.shape[1])):
        codewords, metric = quantized.codewords(columns), second_moment[columns, columns]
        before = codewords[codes[:, group]] * out_scale[:, None]
        codes[:, group] = _nearest(before @ metric + pull[:, columns], codewords, metric, out_scale)
        change = codewords[codes[:, group]] * out_scale[:, None] - before
        pull -= change @ second_moment[columns]
    return codes


def _nearest(products: Tensor, codewords: Tensor, metric: Tensor, out_scale: Tensor) -> Tensor:
    """Return the c that minimises `r2 c M c^T - 2 w M c^T` for every row.

    Args:
        products: `w M`, `[out, d]`.
        codewords: c without the rows' scales, `[k, d]`.
        metric: M, `[d, d]`.
        out_scale: r2, `[out]`. A row with scale 0 takes any codeword.
    """
    points = products / torch.where(out_scale == 0, torch.ones_like(out_scale), out_scale)[:, None]
    offset = ((codewords @ metric) * codewords).sum(dim=1)
    chunks = points.split(max(chunk_elements(points.device) // len(codewords), 1))
    return torch.cat([row_minima(torch.addmm(offset, chunk, codewords.T, alpha=-2))[1] for chunk in chunks])
