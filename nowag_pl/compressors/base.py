"""The one contract of a compression method."""

from math import ceil
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nowag_pl.functional.chunks import row_chunks
from nowag_pl.functional.moments import mean_squares


@runtime_checkable
class Compressor(Protocol):
    """Anything that turns a linear into a smaller one. Its `repr` names it in manifests and reports."""

    def compress(self, linear: nn.Linear, second_moment: Tensor) -> nn.Module:
        """Compress one linear, which is left as it is.

        Args:
            linear: dense linear `[out, in]`, with or without bias.
            second_moment: mean of the squared input of each column, `[in]`, float32.

        Returns:
            A :class:`~nowag_pl.modules.CompressedLinear`.

        Raises:
            ValueError: a weight or moment is not finite, or the settings do not fit the shape.
        """


@runtime_checkable
class Foreseeing(Protocol):
    """A compressor that tells before it has seen a weight what it will make; not all do."""

    working_bytes_per_weight: float
    """Memory of a compression beside the linear and its result, in bytes per weight."""

    def expected_bits_per_weight(self, shape: tuple[int, int], value_bits: int) -> float:
        """Return the storage of a compressed linear.

        Args:
            shape: (out, in).
            value_bits: bits of a dense weight.

        Raises:
            ValueError: the settings do not fit the shape.
        """


@runtime_checkable
class Varying(Protocol):
    """A compressor that offers settings among which a budget can choose; not all do."""

    def alternatives(self) -> list[dict[str, Any]]:
        """Return fields and values, in which each alternative differs from this compressor; none if there is none."""


UNKNOWN_WORKING_BYTES = 32.0
UNKNOWN_GRADIENT_BYTES = 16.0
_FULL_BYTES_PER_PAIR = 48.0  # of inputs: H, damped, its factor or eigenvectors, made in float64
_FULL_BYTES_PER_WEIGHT = 48.0  # copies of the weight while kept weights or codes are fitted to its output


def expected_bits_per_weight(compressor: Compressor, shape: tuple[int, int], value_bits: int) -> float:
    """Return what a compressor foresees, or the bits of a dense weight where it does not.

    Raises:
        ValueError: its settings do not fit the shape.
    """
    return compressor.expected_bits_per_weight(shape, value_bits) if isinstance(compressor, Foreseeing) else value_bits


def working_bytes_per_weight(compressor: Compressor) -> float:
    """Return what a compressor foresees, or 32 where it does not."""
    return compressor.working_bytes_per_weight if isinstance(compressor, Foreseeing) else UNKNOWN_WORKING_BYTES


def num_values(compressor: Compressor, shape: tuple[int, int]) -> int:
    """Return how many values a compressed linear has to train; where it is not told, as many as 16 bits each allow."""
    told = getattr(compressor, "num_values", None)
    if told is not None:
        return int(told(shape))
    return ceil(expected_bits_per_weight(compressor, shape, 16) / 16 * shape[0] * shape[1])


def gradient_bytes_per_weight(compressor: object) -> float:
    """Return what a linear keeps of each restored weight for the gradients of its values; 16 where it is not told."""
    return float(getattr(compressor, "gradient_bytes_per_weight", UNKNOWN_GRADIENT_BYTES))


def working_bytes(compressor: Compressor, shape: tuple[int, int]) -> int:
    """Return the memory of compressing one linear beside it and its result.

    Args:
        compressor: the method.
        shape: (out, in); full second moments are `[in, in]`.
    """
    rows, columns = shape
    total = working_bytes_per_weight(compressor) * rows * columns
    if needs_full_second_moment(compressor):
        total += _FULL_BYTES_PER_PAIR * columns**2 + _FULL_BYTES_PER_WEIGHT * rows * columns
    return round(total)


def needs_full_second_moment(compressor: object) -> bool:
    """Return whether a compressor must be given the matrix `[in, in]`."""
    return bool(getattr(compressor, "full_second_moment", False))


def check_inputs(linear: nn.Linear, second_moment: Tensor, full: bool = False) -> None:
    """Raise ValueError where a weight or a second moment cannot be compressed.

    Args:
        linear: dense linear `[out, in]`.
        second_moment: `[in]` or `[in, in]`.
        full: whether it must be the matrix.
    """
    matrix = second_moment.shape == (linear.in_features, linear.in_features)
    if full and not matrix:
        raise ValueError(
            f"Expected the full second moments of {linear.in_features} input features, a square matrix, but got shape "
            f"{tuple(second_moment.shape)}. SecondMoment(num_features, full=True) gathers them."
        )
    if second_moment.shape != (linear.in_features,) and not matrix:
        raise ValueError(
            f"Expected a second moment for each of {linear.in_features} input features, "
            f"but got shape {tuple(second_moment.shape)}."
        )
    for name, tensor in {"weights": linear.weight, "second moments": second_moment}.items():
        chunks = row_chunks(len(tensor), tensor[0].numel())
        if not all(torch.stack(tensor[rows].aminmax()).isfinite().all() for rows in chunks):
            raise ValueError(
                f"Expected finite {name}, but got {int((~tensor.isfinite()).sum())} NaN or infinite values."
            )
    squares = mean_squares(second_moment)
    if (squares < 0).any():
        raise ValueError(f"Expected second moments of at least 0, but got {float(squares.min()):.3g}.")
