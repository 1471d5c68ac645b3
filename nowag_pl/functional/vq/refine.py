"""A vector-quantized weight (NoWag-VQ, arXiv:2504.14569) fitted to the output of the dense linear, in rounds."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.moments import damped_inverse_factor, output_error, two_sided_error
from nowag_pl.functional.vq.codes import alternating_codes, feedback_codes, sweep_codes, two_sided_codes
from nowag_pl.functional.vq.quantized import Quantized
from nowag_pl.functional.vq.refit import refit_codebook, refit_in_scale, refit_out_scale

Update = Literal["feedback", "alternating", "two_sided"]


@dataclass(frozen=True)
class Refinement:
    """How a quantized weight is fitted to the output of the dense linear.

    Attributes:
        update: way of choosing codes in the first round, "two_sided" in every round, see
            :mod:`nowag_pl.functional.vq.codes`. None: codes and codebook do not change.
        num_rounds: rounds; without an update there is one, of scales alone.
        refit_scales: whether to fit both scales.
        damping: share of its mean that is added to the diagonal of the second moments.
    """

    update: Update | None
    num_rounds: int
    refit_scales: bool
    damping: float


class Metrics(NamedTuple):
    """Second moments of both sides, damped, and the factors of their inverses; those of the outputs may be left out."""

    damped: Float[Tensor, "in in"]
    factor: Float[Tensor, "in in"]
    coupled: Float[Tensor, "out out"] | None = None
    out_factor: Float[Tensor, "out out"] | None = None

    @classmethod
    def of(cls, second_moment: Tensor, output_moment: Tensor | None, damping: float) -> "Metrics":
        """Damp second moments and factor their inverses.

        Raises:
            ValueError: they cannot be inverted.
        """
        inputs = damped_inverse_factor(second_moment, damping)
        return cls(*inputs) if output_moment is None else cls(*inputs, *damped_inverse_factor(output_moment, damping))


def refine(
    weight: Float[Tensor, "out in"],
    start: Quantized,
    second_moment: Float[Tensor, "in in"],
    settings: Refinement,
    output_moment: Float[Tensor, "out out"] | None = None,
) -> Quantized:
    """Lower the output error of a quantized weight, at the same number of bits.

    A round chooses the codes (the first by the given update, the others in sweeps) and fits the codebook, and
    perhaps the scales, to them by least squares.

    Args:
        weight: dense weight W.
        start: quantized weight.
        second_moment: H, mean of x x^T.
        settings: the update and the number of rounds.
        output_moment: H_O, which "two_sided" needs; None for outputs that are not coupled.

    Returns:
        The quantized weight of the smallest output error, measured with the damped H and H_O, the start among them.

    Raises:
        ValueError: H or H_O cannot be inverted.
    """
    weight = weight.float()
    metrics = Metrics.of(second_moment, output_moment, settings.damping)
    damped, coupled = metrics.damped, metrics.coupled

    def error(quantized: Quantized) -> float:
        if coupled is not None:
            return float(two_sided_error(weight, quantized.weight, damped, coupled))
        return float(output_error(weight, quantized.weight, damped).sum(dtype=torch.float64))

    current, best, least = start, start, error(start)
    for number in range(settings.num_rounds if settings.update else 1):
        if settings.update:
            again: Update | Literal["sweep"] = "two_sided" if settings.update == "two_sided" else "sweep"
            current = _choose(weight, current, metrics, settings.update if number == 0 else again)
            current = current._replace(codebook=refit_codebook(weight, current, damped, coupled))
        if settings.refit_scales:
            current = current._replace(out_scale=refit_out_scale(weight, current, damped, coupled))
            current = current._replace(in_scale=refit_in_scale(weight, current, damped, coupled))
        if (reached := error(current)) < least:
            best, least = current, reached
    return best


def _choose(weight: Tensor, current: Quantized, metrics: Metrics, how: Update | Literal["sweep"]) -> Quantized:
    """Choose the codes of a round."""
    if how == "alternating":
        return alternating_codes(weight, current, metrics.damped)
    if how == "feedback":
        return current._replace(codes=feedback_codes(weight, current, metrics.factor))
    if how == "two_sided":
        assert metrics.out_factor is not None
        return current._replace(codes=two_sided_codes(weight, current, metrics.out_factor, metrics.factor))
    return current._replace(codes=sweep_codes(weight, current, metrics.damped))
