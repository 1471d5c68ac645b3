"""Weights that make up for what compression before a linear has done to its input.

Behind compressed linears, a linear is called with x~ instead of the dense model's x. The mean of `|y - W' x~|^2` over
tokens is least for `W' = W + E[(y - W x~) x~^T] E[x~ x~^T]^-1`, where y is what the linear should give: `W x`, as in
GPTAQ (arXiv:2504.02692), or what brings the sum that its output is added to back to the dense model's. A compressor
that takes W' for the weight and `E[x~ x~^T]` for the second moments then lowers the error towards y.
"""

from jaxtyping import Float
from torch import Tensor

from nowag_pl.functional.moments import damped_inverse_factor

# Pulls W' to W, as a share of the mean of the diagonal.
RIDGE = 0.03


def corrected_weight(
    weight: Float[Tensor, "out in"],
    drift: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    ridge: float = RIDGE,
) -> Float[Tensor, "out in"]:
    """Return `W' = W + D (H + ridge)^-1`, float32.

    Args:
        weight: dense weight W.
        drift: D, mean over tokens of `(y - W x~) x~^T`.
        second_moment: H, mean of `x~ x~^T`.
        ridge: what is added to the diagonal of H, as a share of its mean: the larger, the less is corrected.

    Raises:
        ValueError: H cannot be inverted.

    Example:
        >>> import torch
        >>> inputs = 0.5 * torch.eye(2)  # what was 1 is a half behind compressed linears
        >>> corrected_weight(torch.eye(2), (torch.eye(2) - inputs) @ inputs, inputs @ inputs, ridge=1e-6)
        tensor([[2.0000, 0.0000],
                [0.0000, 2.0000]])
    """
    _, factor = damped_inverse_factor(second_moment, ridge)
    return weight.float() + (drift @ factor.T) @ factor
