r"""Rotations that concentrate the importance of weights before pruning (after DenoiseRotator, arXiv:2505.23049).

An orthogonal matrix between two linears changes nothing in a model, but it changes which weights matter. Pruning loses
least where few weights hold nearly all of the importance `s_ij = h_j W_bar_ij^2` (NoWag-P, arXiv:2504.14569), which is
where the entropy of `p = s / sum s` is lowest. With a matrix R after the inputs of a linear are rotated, its weight is
`W R` and their second moments are the diagonal of `R^T H R`; where its outputs are, the weight is `R^T W`.
"""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Gradient = Callable[[int, Tensor], tuple[float, Tensor]]
"""Number of a step and a matrix to the objective there and its gradient."""


class Reader(NamedTuple):
    """A linear whose inputs are rotated.

    Attributes:
        weight: W, `[out, size]`.
        second_moment: H, mean of x x^T over its inputs, `[size, size]`.
    """

    weight: Float[Tensor, "out size"]
    second_moment: Float[Tensor, "size size"]


class Writer(NamedTuple):
    """A linear whose outputs are rotated.

    Attributes:
        weight: W, `[size, in]`.
        squares: h, mean squares of its inputs, `[in]`.
    """

    weight: Float[Tensor, "size in"]
    squares: Float[Tensor, " in"]


class Values(NamedTuple):
    """The linears before and after an attention, between which each head of the values has a rotation of its own.

    Attributes:
        value: weight of the linear that makes the values, `[kv_heads, head_dim, in]`.
        squares: mean squares of its inputs, `[in]`.
        output: weight of the linear after the attention, `[out, heads, head_dim]`; several heads in a row may belong to
            one head of the values.
        moments: mean of x x^T over the inputs of the latter, head by head, `[heads, head_dim, head_dim]`.
    """

    value: Float[Tensor, "kv_heads head_dim in"]
    squares: Float[Tensor, " in"]
    output: Float[Tensor, "out heads head_dim"]
    moments: Float[Tensor, "heads head_dim head_dim"]


def importance_entropy(weight: Float[Tensor, "out in"], squares: Float[Tensor, " in"]) -> Float[Tensor, ""]:
    """Return the entropy of NoWag's normalised importance, minus that of equal importances: 0 at most, in nats.

    Args:
        weight: W, not normalised, float32; the result is differentiable in it.
        squares: h, mean squares of the inputs.

    Example:
        >>> import torch
        >>> importance_entropy(torch.eye(2), torch.ones(2)).item()  # two of four weights matter: log 2 - log 4
        -0.6931471824645996
    """
    smallest = torch.finfo(weight.dtype).tiny
    columns = weight.square().sum(dim=0).clamp(min=smallest)
    scaled = weight.square() / columns
    importance = scaled / scaled.sum(dim=1, keepdim=True).clamp(min=smallest) * squares
    shares = importance / importance.sum().clamp(min=smallest)
    return -torch.special.xlogy(shares, shares.clamp(min=smallest)).sum() - log(weight.numel())


def rotated_squares(second_moment: Float[Tensor, "*b n n"], rotation: Float[Tensor, "*b n n"]) -> Float[Tensor, "*b n"]:
    """Return the mean squares of rotated inputs, the diagonal of `R^T H R`.

    Args:
        second_moment: H.
        rotation: R.
    """
    return ((second_moment @ rotation) * rotation).sum(dim=-2)


def stream_entropy(
    rotation: Float[Tensor, "size size"], readers: list[Reader], writers: list[Writer]
) -> Float[Tensor, ""]:
    """Return the entropy of the linears around a stream that is rotated, averaged over their weights.

    Args:
        rotation: R.
        readers: linears that read the stream; those with the same inputs share their second moments as one object.
        writers: linears that add to it.
    """
    squares = {id(reader.second_moment): rotated_squares(reader.second_moment, rotation) for reader in readers}
    terms = [(reader.weight @ rotation, squares[id(reader.second_moment)]) for reader in readers]
    terms += [(rotation.T @ writer.weight, writer.squares) for writer in writers]
    return _mean(terms)


def value_entropy(rotation: Float[Tensor, "kv_heads head_dim head_dim"], values: Values) -> Float[Tensor, ""]:
    """Return the entropy of the two linears around the values of an attention, averaged over their weights.

    Args:
        rotation: a matrix for each head of the values.
        values: the linears.
    """
    value, output = rotate_values(rotation, values.value, values.output)
    squares = rotated_squares(values.moments, of_query_heads(rotation, len(values.moments)))
    return _mean([(value.flatten(0, 1), values.squares), (output.flatten(1), squares.flatten())])


def rotate_values(
    rotation: Float[Tensor, "kv_heads head_dim head_dim"],
    value: Float[Tensor, "kv_heads head_dim *in"],
    output: Float[Tensor, "out heads head_dim"],
) -> tuple[Float[Tensor, "kv_heads head_dim *in"], Float[Tensor, "out heads head_dim"]]:
    """Return the weights (or biases) before and after an attention whose values are rotated head by head.

    Args:
        rotation: a matrix for each head of the values.
        value: as in :class:`Values`.
        output: as in :class:`Values`.
    """
    turned = torch.einsum("kij,ki...->kj...", rotation, value)
    return turned, torch.einsum("ohi,hij->ohj", output, of_query_heads(rotation, output.shape[1]))


def of_query_heads(
    rotation: Float[Tensor, "kv_heads head_dim head_dim"], num_heads: int
) -> Float[Tensor, "heads head_dim head_dim"]:
    """Return the matrix of the values that each head of the queries sees (grouped-query attention).

    Args:
        rotation: a matrix for each head of the values.
        num_heads: heads of the queries.
    """
    return rotation.repeat_interleave(num_heads // len(rotation), dim=0)


def _mean(terms: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean entropy of weights and the mean squares of their inputs, by their number of weights."""
    total = sum(weight.numel() for weight, _ in terms)
    parts = [importance_entropy(weight, squares) * (weight.numel() / total) for weight, squares in terms]
    return torch.stack(parts).sum()


def learn_rotation(
    start: Float[Tensor, "*b n n"], gradient: Gradient, num_steps: int, learning_rate: float
) -> Float[Tensor, "*b n n"]:
    """Return an orthogonal matrix, or several, that lower an objective, by Adam on skew-symmetric matrices (Cayley).

    The learning rate falls to zero along a cosine.

    Args:
        start: orthogonal matrices from which to start.
        gradient: the objective, of all linears or of other ones at each step.
        num_steps: steps of Adam.
        learning_rate: at the first step, in entries of the skew-symmetric matrix.
    """
    holder = nn.Module()
    holder.register_parameter("matrix", nn.Parameter(start.clone()))
    parametrizations.orthogonal(holder, "matrix", orthogonal_map="cayley")
    # Assigned once more, as the first value of a parametrised matrix is drawn.
    holder.matrix = start
    optimizer = torch.optim.Adam(holder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(num_steps, 1))
    for step in range(num_steps):
        with torch.enable_grad():
            matrix = holder.matrix
        _, slope = gradient(step, matrix.detach())
        optimizer.zero_grad()
        matrix.backward(slope)
        optimizer.step()
        schedule.step()
    return holder.matrix.detach()


def principal_axes(second_moment: Float[Tensor, "*b n n"], generator: torch.Generator) -> Float[Tensor, "*b n n"]:
    """Return the eigenvectors of second moments as columns, from which to start.

    They are in random order: among the M neighbours of an N:M pattern there should be large axes and small ones.

    Args:
        second_moment: H, or several.
        generator: source of randomness, on the CPU.
    """
    axes = torch.linalg.eigh(second_moment.double())[1].to(second_moment.dtype)
    return axes[..., torch.randperm(axes.shape[-1], generator=generator).to(axes.device)]


def random_hadamard(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Return a random orthogonal matrix whose entries are nearly equal in size.

    Random signs, then Sylvester's matrix of the largest power of two that divides the size; what is left of the size is
    mixed by a random orthogonal matrix.

    Args:
        size: rows and columns.
        generator: source of randomness, on the CPU.
    """
    power = size & -size
    sylvester = torch.ones(1, 1)
    while len(sylvester) < power:
        sylvester = torch.cat([torch.cat([sylvester, sylvester], 1), torch.cat([sylvester, -sylvester], 1)])
    rest, _ = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))
    signs = 2.0 * torch.randint(0, 2, (size, 1), generator=generator) - 1
    return (signs * torch.kron(rest.contiguous(), sylvester.double() / power**0.5)).float()
