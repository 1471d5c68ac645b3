"""Weights that compensate for the error that earlier compression causes in a linear's input.

After compressed linears, a linear receives x~ instead of the dense model's x. The mean of `|y - W' x~|^2` over
tokens is least for `W' = W + E[(y - W x~) x~^T] E[x~ x~^T]^-1`, where y is the desired output: `W x`, as in GPTAQ
(arXiv:2504.02692), or the output that makes the residual stream equal to the dense model's. A compressor that uses W'
as the weight and `E[x~ x~^T]` as the second moments then lowers the error relative to y.
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
        ridge: addition to the diagonal of H, as a share of its mean: the larger, the smaller the correction.

    Raises:
        ValueError: H cannot be inverted.

    Example:
        >>> import torch
        >>> inputs = 0.5 * torch.eye(2)  # compressed linears have halved the inputs of 1
        >>> corrected_weight(torch.eye(2), (torch.eye(2) - inputs) @ inputs, inputs @ inputs, ridge=1e-6)
        tensor([[2.0000, 0.0000],
                [0.0000, 2.0000]])
    """
    _, factor = damped_inverse_factor(second_moment, ridge)
    return weight.float() + (drift @ factor.T) @ factor
