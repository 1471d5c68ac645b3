r"""How far a model's predictions move when the outputs of one of its linears do, from gradients.

To second order the Kullback-Leibler divergence of the moved predictions is `1/2 d^T F d`, where d is the change and F
the Fisher information: the mean of g g^T over labels that the model itself draws, with g the gradient of their negative
log likelihood. Of F its diagonal is taken, one number for each output at each token, so that

    KL ~ 1/2 sum_ti g_ti^2 d_ti^2

over tokens t and outputs i (as in optimal brain damage, LeCun et al., 1989, for outputs instead of weights).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def predicted_divergence(change: Float[Tensor, "... out"], gradient: Float[Tensor, "... out"]) -> Float[Tensor, ""]:
    """Return `1/2 sum g^2 d^2`, summed in float64, in nats.

    Args:
        change: d, the change of the outputs of a linear.
        gradient: g, of the negative log likelihood of drawn labels, summed over the positions that predict them.

    Example:
        >>> import torch
        >>> predicted_divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])).item()
        6.5
    """
    return (change.float() * gradient.float()).square().sum(dim=-1).sum(dtype=torch.float64) / 2


def drawn_labels(
    logits: Float[Tensor, "tokens vocabulary"], uniform: Float[Tensor, " tokens"]
) -> Int[Tensor, " tokens"]:
    """Draw a token at each position from the predicted distribution.

    Args:
        logits: predictions.
        uniform: a random number in [0, 1) for each position; the label is where it falls among the cumulated
            probabilities.

    Example:
        >>> import torch
        >>> drawn_labels(torch.zeros(3, 4), torch.tensor([0.1, 0.3, 0.9])).tolist()
        [0, 1, 3]
    """
    cumulated = F.softmax(logits.float(), dim=-1).cumsum(dim=-1)
    # The last cumulated probability is 1 except for rounding.
    thresholds = uniform.to(cumulated) * cumulated[:, -1]
    return (cumulated <= thresholds[:, None]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def label_gradient(
    logits: Float[Tensor, "tokens vocabulary"], labels: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens vocabulary"]:
    """Return the gradient of the summed negative log likelihood of labels in the logits, in their type.

    Args:
        logits: predictions.
        labels: a token for each position.
    """
    return (F.softmax(logits.float(), dim=-1) - F.one_hot(labels, logits.shape[-1])).to(logits.dtype)
