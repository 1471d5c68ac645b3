"""NoWag-P and NoWag-VQ (arXiv:2504.14569)."""

from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import (
    Compressor,
    check_inputs,
    check_output_moment,
    empty_settings,
    missing_output_moment,
)
from nowag_pl.compressors.pruner import Pruner
from nowag_pl.functional.alternating import alternating_keep
from nowag_pl.functional.least_squares import refit_kept
from nowag_pl.functional.moments import damped_inverse_factor, mean_squares
from nowag_pl.functional.normalization import norms
from nowag_pl.functional.objective import output_weights
from nowag_pl.functional.pruning import keep_structured, normalized_scores
from nowag_pl.functional.ranges import check_real, check_whole
from nowag_pl.functional.vq.kmeans import KMeansSettings, check_num_codewords, weighted_kmeans
from nowag_pl.functional.vq.quantized import Quantized, SubvectorWeights, normalized_subvectors, subvectors
from nowag_pl.functional.vq.refine import Refinement, refine
from nowag_pl.modules import MaskedLinear, VQLinear

DAMPING = 0.01
# Steps of conjugate gradients.
REFIT_STEPS = 60


@dataclass(frozen=True)
class NoWagPruner(Pruner):
    """NoWag-P: keep the largest `h_j W_bar_ij^2` of the normalised weight.

    Args:
        sparsity: fraction of the weights to remove, in [0, 1). null: 0.5, unless there is a pattern.
        pattern: (N, M) to keep N of every M consecutive weights of a row, such as [2, 4]. null: no pattern.
        structured: remove whole "rows" (output channels) or "columns" (input channels). null: single weights.
        update: compensation of removed weights by the kept ones, by the full second moments. null: none, as in the
            paper; "refit": the weights that NoWag-P keeps are fitted to the linear's output by least squares;
            "alternating": mask and values are chosen together by alternating directions (ADMM), then the values fitted.
        damping: with an update, the addition to the diagonal of the second moments, as a share of its mean.
    """

    structured: Literal["rows", "columns"] | None = None
    update: Literal["refit", "alternating"] | None = None
    damping: float = DAMPING

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: as :class:`Pruner`, both pattern and structured are given, or damping is not positive.
        """
        super().__post_init__()
        if self.structured not in (None, "rows", "columns"):
            raise ValueError(f"Expected structured to be 'rows', 'columns' or null, but got {self.structured!r}.")
        if self.structured and self.pattern:
            raise ValueError(f"Expected pattern or structured, but got {self.pattern} and {self.structured!r}.")
        if self.update not in (None, "refit", "alternating"):
            raise ValueError(f"Expected update to be 'refit', 'alternating' or null, but got {self.update!r}.")
        check_real("damping", self.damping, above=True)

    @property
    def full_second_moment(self) -> bool:
        """Whether the matrix of x x^T is needed."""
        return self.update is not None

    @torch.no_grad()
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> MaskedLinear:
        """Prune one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        if self.update is None:
            return super().compress(linear, second_moment)
        check_inputs(linear, second_moment, full=True)
        matrix = second_moment.to(linear.weight.device)
        damped, _ = damped_inverse_factor(matrix, self.damping)
        if self.update == "refit":
            keep = self.keep(self.scores(linear.weight, matrix.diagonal()))
        else:
            keep = alternating_keep(linear.weight, damped, self.keep)
        weight = refit_kept(linear.weight, keep, damped, REFIT_STEPS)
        return MaskedLinear(weight.to(linear.weight.dtype), keep, linear.bias, self.pattern)

    def scores(self, weight: Tensor, second_moment: Tensor) -> Tensor:
        """Return NoWag-P's importance, `[out, in]`."""
        return normalized_scores(weight, second_moment)

    def keep(self, scores: Tensor) -> Tensor:
        """Return the mask, `[out, in]`."""
        if self.structured is None:
            return super().keep(scores)
        assert self.sparsity is not None
        return keep_structured(scores, self.sparsity, dim=0 if self.structured == "rows" else 1)

    def num_kept(self, shape: tuple[int, int]) -> int:
        """Return the number of kept weights of a linear `(out, in)`, in whole rows or columns if structured."""
        if self.structured is None:
            return super().num_kept(shape)
        lines, length = shape if self.structured == "rows" else shape[::-1]
        return super().num_kept((1, lines)) * length


@dataclass(frozen=True)
class NoWagQuantizer(Compressor):
    """NoWag-VQ: weighted k-means over subvectors of the rows of the normalised weight.

    Args:
        subvector_dim: weights per codeword (d). Rows that it does not divide are padded with weightless zeros.
        codebook_size: number of codewords (k) of each linear. Codes cost log2(k) / d bits per weight.
        seed: seed of the k-means++ start.
        max_iters: largest number of Lloyd iterations.
        tolerance: stop when an iteration lowers the loss by less than this fraction; 0 to stop only when the codes
            settle.
        weighting: weight of an error of the normalised weight. "normalized": the paper's `h_j`; "output": its effect on
            the linear's output, `h_j r1_j^2 r2_i^2`.
        restarts: number of k-means runs from different starts; the one with the smallest loss is used.
        update: compensation of errors among codes, by the full second moments. null: none, as in the paper;
            "feedback": each column of subvectors compensates for the errors of those before it; "alternating": codes
            and codebook are chosen by alternating directions (ADMM); "two_sided": each subvector compensates for the
            errors to its left and above it, which needs calibration.guidance. In all, least squares fit the codebook.
        rounds: with an update, number of rounds of choosing codes and fitting the codebook; after the first round, each
            column compensates for the errors of all others, except with "two_sided".
        refit_scales: fit the scales to the linear's output by least squares, by the full second moments.
        damping: for both, the addition to the diagonal of the second moments, as a share of its mean.
    """

    subvector_dim: int = 6
    codebook_size: int = 4096
    seed: int = 0
    max_iters: int = 100
    tolerance: float = 5e-4
    weighting: Literal["output", "normalized"] = "normalized"
    restarts: int = 1
    update: Literal["feedback", "alternating", "two_sided"] | None = None
    rounds: int = 4
    refit_scales: bool = False
    damping: float = DAMPING

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a number is out of its range.
        """
        least_of = {"subvector_dim": 1, "codebook_size": 1, "max_iters": 0, "restarts": 1, "rounds": 1, "seed": 0}
        for name, least in least_of.items():
            check_whole(name, getattr(self, name), least)
        check_real("tolerance", self.tolerance)
        if self.weighting not in ("output", "normalized"):
            raise ValueError(f"Expected weighting to be 'output' or 'normalized', but got {self.weighting!r}.")
        if self.update not in (None, "feedback", "alternating", "two_sided"):
            raise ValueError(
                f"Expected update to be 'feedback', 'alternating', 'two_sided' or null, but got {self.update!r}."
            )
        check_real("damping", self.damping, above=True)

    @property
    def full_second_moment(self) -> bool:
        """Whether the matrix of x x^T is needed."""
        return self.update is not None or self.refit_scales

    @property
    def output_moment(self) -> bool:
        """Whether second moments of gradients at the outputs are needed."""
        return self.update == "two_sided"

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> VQLinear:
        """Return the quantized linear without values; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_num_codewords(self.codebook_size, shape[0] * ceil(shape[1] / self.subvector_dim))
        own = {"subvector_dim": self.subvector_dim, "codebook_size": self.codebook_size}
        with torch.device("meta"):
            return VQLinear.empty({**empty_settings(shape, dtype, bias), **own})

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Return the memory of points in float32, a distance and up to 4 codes of each subvector, and of chunks."""
        return round((5 + 20 / self.subvector_dim) * shape[0] * shape[1]) + self.full_moment_bytes(shape)

    def alternatives(self) -> list[dict[str, Any]]:
        """Return other codebooks, none larger.

        For this and the next two smaller lengths of a codeword, three sizes, each half of the one before, that cost at
        most one bit per weight more.
        """
        bits = self.codebook_size.bit_length() - 1
        others: list[dict[str, Any]] = []
        for dim in range(self.subvector_dim, max(self.subvector_dim - 3, 0), -1):
            most = min(bits, floor(dim * (bits / self.subvector_dim + 1)))
            others += [{"subvector_dim": dim, "codebook_size": 2**each} for each in range(most, max(most - 3, 0), -1)]
        return [each for each in others if replace(self, **each) != self]

    def compress(self, linear: nn.Linear, second_moment: Tensor) -> VQLinear:
        """Quantize one linear; see :class:`~nowag_pl.compressors.base.Compressor`."""
        if self.output_moment:
            raise missing_output_moment()
        return self._compress(linear, second_moment)

    def compress_coupled(self, linear: nn.Linear, second_moment: Tensor, output_moment: Tensor) -> VQLinear:
        """Quantize one linear by both of its sides; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_output_moment(linear, output_moment)
        return self._compress(linear, second_moment, output_moment.to(linear.weight.device))

    @torch.no_grad()
    def _compress(self, linear: nn.Linear, second_moment: Tensor, output_moment: Tensor | None = None) -> VQLinear:
        check_inputs(linear, second_moment, self.full_second_moment)
        quantized = self._quantize(linear, mean_squares(second_moment))
        if self.full_second_moment:
            matrix = second_moment.to(linear.weight.device)
            settings = Refinement(self.update, self.rounds, self.refit_scales, self.damping)
            quantized = refine(linear.weight, quantized, matrix, settings, output_moment)
        return VQLinear(*quantized, linear.bias, linear.weight.dtype)

    def _quantize(self, linear: nn.Linear, second_moment: Tensor) -> Quantized:
        """Fit codebook and codes to the normalised weight by k-means."""
        in_scale, out_scale = norms(linear.weight)
        points = normalized_subvectors(linear.weight, in_scale, out_scale, self.subvector_dim)  # [out * groups, d]
        weights = self._weights(in_scale, out_scale, second_moment.to(in_scale.device))
        generator = torch.Generator().manual_seed(self.seed)
        settings = KMeansSettings(self.codebook_size, self.max_iters, self.tolerance)
        fits = (weighted_kmeans(points, weights, settings, generator) for _ in range(self.restarts))
        fit = min(fits, key=lambda fit: fit.loss)
        codes = fit.codes.view(linear.out_features, -1)
        return Quantized(fit.codebook, codes, in_scale, out_scale)

    def _weights(self, in_scale: Tensor, out_scale: Tensor, second_moment: Tensor) -> SubvectorWeights:
        """Return the weight of each coordinate in the k-means objective, up to a factor."""
        if self.weighting == "normalized":
            return SubvectorWeights(subvectors(second_moment[None], self.subvector_dim))
        rows, columns = output_weights(in_scale, out_scale, second_moment)
        return SubvectorWeights(subvectors(columns[None], self.subvector_dim), rows)
