"""Weights of tokens by the final loss: the squared gradient at a linear's output (arXiv:2505.07004).

To second order, an error `e_t` of a linear's outputs at token t changes the final loss by about
`sum_i g_ti^2 e_ti^2 / 2`, with g the gradient of the loss. If all outputs of a linear share one weight, `g_ti^2`
becomes its mean over them, one number for each token, and the second moments become the mean of `w_t x_t x_t^T`.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def token_weights(gradient: Float[Tensor, "... out"]) -> Float[Tensor, "..."]:
    """Return `w_t = mean_i g_ti^2`, float32.

    Args:
        gradient: g, the gradient of the final loss at the outputs of a linear.

    Example:
        >>> import torch
        >>> token_weights(torch.tensor([[1.0, 3.0], [0.0, 2.0]])).tolist()
        [5.0, 2.0]
    """
    return gradient.float().square().mean(dim=-1)


def tempered(weights: Float[Tensor, "sequences tokens"], power: float) -> Float[Tensor, "sequences tokens"]:
    """Return `w^power`, divided by its mean; ones where all weights are zero.

    Args:
        weights: w, of at least 0.
        power: exponent of the weights: 1 for no change, 0 for equal weights.

    Example:
        >>> import torch
        >>> tempered(torch.tensor([[1.0, 9.0]]), 0.5).tolist()
        [[0.5, 1.5]]
    """
    powered = weights.double().pow(power)
    mean = powered.mean()
    return (powered / mean).float() if mean > 0 else torch.ones_like(weights)
