"""A vector-quantized weight (NoWag-VQ, arXiv:2504.14569) fitted to the output of the dense linear, in rounds."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.moments import damped_inverse_factor, output_error
from nowag_pl.functional.vq.codes import alternating_codes, feedback_codes, sweep_codes
from nowag_pl.functional.vq.quantized import Quantized
from nowag_pl.functional.vq.refit import refit_codebook, refit_in_scale, refit_out_scale

Update = Literal["feedback", "alternating"]


@dataclass(frozen=True)
class Refinement:
    """How a quantized weight is fitted to the output of the dense linear.

    Attributes:
        update: way of choosing codes in the first round, see :mod:`nowag_pl.functional.vq.codes`. None: codes and
            codebook do not change.
        num_rounds: rounds; without an update there is one, of scales alone.
        refit_scales: whether to fit both scales.
        damping: share of its mean that is added to the diagonal of the second moments.
    """

    update: Update | None
    num_rounds: int
    refit_scales: bool
    damping: float


def refine(
    weight: Float[Tensor, "out in"], start: Quantized, second_moment: Float[Tensor, "in in"], settings: Refinement
) -> Quantized:
    """Lower the output error of a quantized weight, at the same number of bits.

    A round chooses the codes (the first by the given update, the others in sweeps) and fits the codebook, and
    perhaps the scales, to them by least squares.

    Args:
        weight: dense weight W.
        start: quantized weight.
        second_moment: H, mean of x x^T.
        settings: the update and the number of rounds.

    Returns:
        The quantized weight of the smallest output error, measured with the damped H, the start among them.

    Raises:
        ValueError: H cannot be inverted.
    """
    weight = weight.float()
    damped, factor = damped_inverse_factor(second_moment, settings.damping)

    def error(quantized: Quantized) -> float:
        return float(output_error(weight, quantized.weight, damped).sum(dtype=torch.float64))

    current, best, least = start, start, error(start)
    for number in range(settings.num_rounds if settings.update else 1):
        if settings.update:
            current = _choose(weight, current, damped, factor, settings.update if number == 0 else "sweep")
            current = current._replace(codebook=refit_codebook(weight, current, damped))
        if settings.refit_scales:
            current = current._replace(out_scale=refit_out_scale(weight, current, damped))
            current = current._replace(in_scale=refit_in_scale(weight, current, damped))
        if (reached := error(current)) < least:
            best, least = current, reached
    return best


def _choose(
    weight: Tensor, current: Quantized, damped: Tensor, factor: Tensor, how: Update | Literal["sweep"]
) -> Quantized:
    """Choose the codes of a round."""
    if how == "alternating":
        return alternating_codes(weight, current, damped)
    if how == "feedback":
        return current._replace(codes=feedback_codes(weight, current, factor))
    return current._replace(codes=sweep_codes(weight, current, damped))
