"""The base of every compression method."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.chunks import row_chunks
from nowag_pl.functional.moments import mean_squares
from nowag_pl.modules import CompressedLinear
from nowag_pl.modules.compressed.base import dtype_name

# Memory of a full second moment for each pair of inputs: H, H damped, and its factor or eigenvectors, made in float64.
_FULL_BYTES_PER_PAIR = 48
# Copies of the weight while kept weights or codes are fitted to its output.
_FULL_BYTES_PER_WEIGHT = 48


class Compressor(ABC):
    """A method that turns a linear into a smaller one. Its `repr` names it in manifests and reports.

    Only :meth:`compress` must be written. The other members have defaults that suit any method; overriding them makes
    the estimates of memory, disk and bits exact.
    """

    @property
    def full_second_moment(self) -> bool:
        """Whether :meth:`compress` needs the matrix of x x^T, `[in, in]`, instead of mean squares."""
        return False

    @abstractmethod
    def compress(self, linear: nn.Linear, second_moment: Tensor) -> CompressedLinear:
        """Compress one linear, which is not changed.

        Args:
            linear: dense linear `[out, in]`, with or without bias.
            second_moment: mean of the squared input of each column, `[in]`, float32; the mean of x x^T, `[in, in]`,
                if :attr:`full_second_moment` is True.

        Raises:
            ValueError: a weight or moment is not finite, or the settings do not fit the shape.
        """

    @property
    def output_moment(self) -> bool:
        """Whether linears are given to :meth:`compress_coupled`, with second moments of gradients at their outputs."""
        return False

    def compress_coupled(self, linear: nn.Linear, second_moment: Tensor, output_moment: Tensor) -> CompressedLinear:
        """Do as :meth:`compress` with outputs that the final loss couples.

        Args:
            linear: dense linear `[out, in]`, with or without bias.
            second_moment: as for :meth:`compress`.
            output_moment: mean of G G^T over sequences, `[out, out]`, float32, with G the gradient of the final loss in
                the weight.

        Raises:
            ValueError: as :meth:`compress`.
        """
        return self.compress(linear, second_moment)

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> CompressedLinear | None:
        """Return the result of :meth:`compress` on the meta device, without values.

        Its `bits_per_weight`, `storage_bytes`, parameters and memory are those of the compressed linear.

        Args:
            shape: (out, in).
            dtype: type of the dense weight.
            bias: whether the linear has a bias.

        Returns:
            None if the module depends on the values of the weights.

        Raises:
            ValueError: the settings do not fit the shape.
        """
        return None

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Return the memory for compressing one linear, in addition to the linear and its result, in bytes.

        Args:
            shape: (out, in).
        """
        return 32 * shape[0] * shape[1] + self.full_moment_bytes(shape)

    def full_moment_bytes(self, shape: tuple[int, int]) -> int:
        """Return the part of :meth:`working_bytes` that full second moments cause; 0 if they are not needed.

        Args:
            shape: (out, in).
        """
        rows, columns = shape
        pairs = self.full_second_moment * columns**2 + self.output_moment * rows**2
        return _FULL_BYTES_PER_PAIR * pairs + self.full_second_moment * _FULL_BYTES_PER_WEIGHT * rows * columns

    def alternatives(self) -> list[dict[str, Any]]:
        """Return other settings that a budget may choose, each as the fields that differ from this compressor's."""
        return []

    def describe(self) -> dict[str, Any]:
        """Return class name and settings as JSON values, for the manifest."""
        settings = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else dict(vars(self))
        return {"compressor": type(self).__name__, **settings}


def empty_settings(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> dict[str, Any]:
    """Return the settings that the empty modules of all methods share.

    Args:
        shape: (out, in).
        dtype: type of the dense weight, and of its bias.
        bias: whether there is one.
    """
    name = dtype_name(dtype)
    return {"in_features": shape[1], "out_features": shape[0], "bias": name if bias else None, "dtype": name}


def check_output_moment(linear: nn.Linear, output_moment: Tensor) -> None:
    """Raise ValueError if second moments of gradients do not fit a linear or are not finite.

    Args:
        linear: dense linear `[out, in]`.
        output_moment: `[out, out]`.
    """
    expected = (linear.out_features, linear.out_features)
    if output_moment.shape != expected or not output_moment.isfinite().all():
        raise ValueError(
            f"Expected finite second moments of gradients of shape {expected}, but got shape "
            f"{tuple(output_moment.shape)} with {int((~output_moment.isfinite()).sum())} NaN or infinite values."
        )


def missing_output_moment() -> ValueError:
    """Return the error of a method that couples outputs and is not told how."""
    return ValueError(
        "Expected, with update 'two_sided', second moments of gradients at the outputs: set calibration.guidance, or "
        "call compress_coupled with them."
    )


def check_inputs(linear: nn.Linear, second_moment: Tensor, full: bool = False) -> None:
    """Raise ValueError if a weight or a second moment cannot be used for compression.

    Args:
        linear: dense linear `[out, in]`.
        second_moment: `[in]` or `[in, in]`.
        full: whether it must be the matrix.
    """
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"Expected an nn.Linear to compress, but got {type(linear).__name__}.")
    if not isinstance(second_moment, Tensor) or not second_moment.is_floating_point():
        kind = second_moment.dtype if isinstance(second_moment, Tensor) else type(second_moment).__name__
        raise ValueError(f"Expected a second moment as a tensor of floating type, but got {kind}.")
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
