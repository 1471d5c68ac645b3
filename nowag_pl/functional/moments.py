"""The error of a linear's output, `tr((W - W_hat) H (W - W_hat)^T)`, where H is the mean of x x^T over tokens.

NoWag's own objective (arXiv:2504.14569) takes H for diagonal. With the whole matrix, an error in one column can be made
up for in the others, as in GPTQ (arXiv:2210.17323).
"""

import torch
from jaxtyping import Float
from torch import Tensor

# Each trial has ten times the damping of the one before.
DAMPING_TRIALS = 4


def mean_squares(second_moment: Tensor) -> Float[Tensor, " in"]:
    """Return h, the mean squares `[in]`, of second moments that are h or the matrix `[in, in]` with the diagonal h."""
    return second_moment.diagonal() if second_moment.dim() == 2 else second_moment


def shrunk(own: Tensor, everywhere: Tensor, num_tokens: int, shrinkage: float) -> Tensor:
    """Return `(n own + s everywhere) / (n + s)`: second moments over few tokens, shrunk towards those over all tokens.

    Args:
        own: mean of x_j^2 `[in]`, or of x x^T `[in, in]`, over some tokens.
        everywhere: the same over all tokens.
        num_tokens: n, the number of those in `own`.
        shrinkage: s, the number of tokens that `everywhere` counts for.

    Example:
        >>> import torch
        >>> shrunk(torch.tensor([4.0]), torch.tensor([1.0]), num_tokens=10, shrinkage=5.0).item()
        3.0
    """
    if num_tokens == 0:
        return everywhere
    share = num_tokens / (num_tokens + shrinkage)
    return share * own + (1 - share) * everywhere


def output_error(
    weight: Float[Tensor, "out in"],
    reconstruction: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
) -> Float[Tensor, " out"]:
    """Return the mean squared error of each output over the tokens that made the second moments.

    Args:
        weight: W.
        reconstruction: W_hat.
        second_moment: H, mean of x x^T.

    Example:
        >>> import torch
        >>> output_error(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])).item()
        3.0
    """
    error = weight.float() - reconstruction.float()
    return ((error @ second_moment) * error).sum(dim=1)


def two_sided_error(
    weight: Float[Tensor, "out in"],
    reconstruction: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"],
    output_moment: Float[Tensor, "out out"],
) -> Float[Tensor, ""]:
    """Return `tr(H_O E H E^T)`, the change of the final loss to second order, up to a factor; summed in float64.

    Args:
        weight: W.
        reconstruction: W_hat; E is their difference.
        second_moment: H, mean of x x^T.
        output_moment: H_O, mean of G G^T over sequences, G the gradient of the final loss in the weight.
    """
    error = weight.float() - reconstruction.float()
    return ((error @ second_moment) * (output_moment @ error)).sum(dtype=torch.float64)


def damp(second_moment: Float[Tensor, "in in"], damping: float) -> Float[Tensor, "in in"]:
    """Return `H + damping * mean(diagonal) * I`; the identity where all inputs are zero.

    Args:
        second_moment: H, mean of x x^T.
        damping: share of the mean of the diagonal.
    """
    mean = second_moment.diagonal().mean()
    amount = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    return second_moment + torch.diag(amount.expand(len(second_moment)))


def damped_inverse_factor(
    second_moment: Float[Tensor, "in in"], damping: float
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """Return the damped H and the upper triangular U with `U^T U` its inverse, computed in float64.

    If H cannot be inverted with this damping, it is damped ten times more, up to three times.

    Args:
        second_moment: H, mean of x x^T.
        damping: share of the mean of the diagonal that is added to it.

    Raises:
        ValueError: H is not positive definite even with the most damping.
    """
    for trial in range(DAMPING_TRIALS):
        damped = damp(second_moment, damping * 10**trial)
        lower, failed = torch.linalg.cholesky_ex(damped.double())
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and upper.isfinite().all():
            return damped, upper.float()
    raise ValueError(
        "Expected second moments that can be inverted when they are damped, but they are not positive definite with "
        f"{damping * 10 ** (DAMPING_TRIALS - 1):.3g} of their mean on the diagonal. Give more calibration tokens or a "
        "larger damping."
    )
