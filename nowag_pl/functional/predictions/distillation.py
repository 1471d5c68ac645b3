"""Knowledge distillation: divergence of a student's predictions from a teacher's at a temperature.

The loss is that of Hinton et al. (arXiv:1503.02531, section 2): both distributions are softened by a temperature T, and
the divergence is multiplied by T^2, so that gradients keep their size at any T.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def distillation_loss(
    teacher_logits: Float[Tensor, "tokens vocabulary"],
    logits: Float[Tensor, "tokens vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """Return `T^2 KL(softmax(teacher / T) || softmax(student / T))` of each token, in nats.

    Args:
        teacher_logits: predictions to come near to.
        logits: predictions that are trained.
        temperature: T; above 1, unlikely tokens count more.

    Example:
        >>> import torch
        >>> distillation_loss(torch.zeros(1, 4), torch.zeros(1, 4)).item()
        0.0
    """
    log_p = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1) * temperature**2


def top_log_probabilities(
    logits: Float[Tensor, "tokens vocabulary"], top_k: int, temperature: float = 1.0
) -> tuple[Float[Tensor, "tokens top_k"], Int[Tensor, "tokens top_k"]]:
    """Return the `top_k` largest log-probabilities at a temperature, float32, and their tokens, int32.

    Args:
        logits: predictions.
        top_k: number of tokens, at most the vocabulary.
        temperature: divisor of the logits.
    """
    log_probabilities = F.log_softmax(logits.float() / temperature, dim=-1)
    values, tokens = log_probabilities.topk(top_k, dim=-1)
    return values, tokens.to(torch.int32)


def top_distillation_loss(
    teacher_log_probabilities: Float[Tensor, "tokens top_k"],
    teacher_tokens: Int[Tensor, "tokens top_k"],
    logits: Float[Tensor, "tokens vocabulary"],
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """Return the loss of :func:`distillation_loss` with all tokens but the teacher's likeliest lumped into one.

    It never exceeds the full divergence, and equals it where `top_k` is the vocabulary.

    Args:
        teacher_log_probabilities: of :func:`top_log_probabilities`, at the same temperature.
        teacher_tokens: their tokens.
        logits: predictions that are trained.
        temperature: T.
    """
    log_q = F.log_softmax(logits.float() / temperature, dim=-1)
    top_log_q = log_q.gather(-1, teacher_tokens.long())
    loss = F.kl_div(top_log_q, teacher_log_probabilities, reduction="none", log_target=True).sum(dim=-1)
    if teacher_tokens.shape[-1] < logits.shape[-1]:
        rest_p = (1 - teacher_log_probabilities.exp().sum(dim=-1)).clamp_min(0)
        others = torch.zeros_like(log_q).scatter(-1, teacher_tokens.long(), -torch.inf)
        rest_log_q = (log_q + others).logsumexp(dim=-1)
        loss = loss + torch.xlogy(rest_p, rest_p) - rest_p * rest_log_q
    return loss * temperature**2
