"""The one contract of a compression method."""

from typing import Protocol, runtime_checkable

from torch import Tensor, nn


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


def check_inputs(linear: nn.Linear, second_moment: Tensor) -> None:
    """Raise ValueError where a weight or a second moment cannot be compressed.

    Args:
        linear: dense linear `[out, in]`.
        second_moment: `[in]`.
    """
    if second_moment.shape != (linear.in_features,):
        raise ValueError(
            f"Expected a second moment for each of {linear.in_features} input features, "
            f"but got shape {tuple(second_moment.shape)}."
        )
    for name, tensor in {"weights": linear.weight, "second moments": second_moment}.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"Expected finite {name}, but got {int((~tensor.isfinite()).sum())} NaN or infinite values."
            )
    if (second_moment < 0).any():
        raise ValueError(f"Expected second moments of at least 0, but got {float(second_moment.min()):.3g}.")
