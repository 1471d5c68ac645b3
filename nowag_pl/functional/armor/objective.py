"""The objective of ARMOR (arXiv:2510.05528), `sum_ij u_i h_j (W_bar - A S B)_ij^2`, its terms and its gradient."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nowag_pl.functional.armor.block_diagonal import multiply_left, multiply_right


class ArmorTarget(NamedTuple):
    """The weight to approximate, and the weights of its errors."""

    weight: Float[Tensor, "out in"]  # W_bar
    row_weights: Float[Tensor, " out"]  # u
    column_weights: Float[Tensor, " in"]  # h

    def loss(self, residual: Float[Tensor, "out in"]) -> float:
        """Return the objective of a residual `W_bar - A S B`; sums over columns are float64."""
        return float((self.row_weights @ residual.square()).double() @ self.column_weights.double())


class ArmorFactors(NamedTuple):
    """A, S with its mask, and B."""

    out_factor: Float[Tensor, "p a a"]
    core: Float[Tensor, "out in"]  # zeros where removed
    keep: Bool[Tensor, "out in"]
    in_factor: Float[Tensor, "q b b"]


class ArmorGradients(NamedTuple):
    """Derivatives of the objective, that by S at removed weights too."""

    out_factor: Float[Tensor, "p a a"]
    core: Float[Tensor, "out in"]
    in_factor: Float[Tensor, "q b b"]


def identity_factors(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out in"], out_block: int, in_block: int
) -> ArmorFactors:
    """Return `A = I`, `S = W_bar` at the kept places, `B = I`.

    Args:
        weight: normalised weight W_bar.
        keep: N:M mask.
        out_block: size of the blocks of A; divides out.
        in_block: size of the blocks of B; divides in.
    """
    out_features, in_features = weight.shape
    out_identity, in_identity = (torch.eye(size, device=weight.device) for size in (out_block, in_block))
    return ArmorFactors(
        out_identity.repeat(out_features // out_block, 1, 1),
        weight * keep,
        keep,
        in_identity.repeat(in_features // in_block, 1, 1),
    )


def reconstruct(factors: ArmorFactors) -> Float[Tensor, "out in"]:
    """Return `A S B`."""
    return multiply_right(multiply_left(factors.out_factor, factors.core), factors.in_factor)


def gradients_of(target: ArmorTarget, factors: ArmorFactors, residual: Float[Tensor, "out in"]) -> ArmorGradients:
    """Return the gradient of the objective.

    With `D_ij = -2 u_i h_j (W_bar - A S B)_ij`: `dA = D B^T S^T`, `dS = A^T D B^T`, `dB = (A S)^T D`, the first and the
    last within their blocks.

    Args:
        target: the weight to approximate, and the weights of its errors.
        factors: where the derivative is taken.
        residual: W_bar - A S B there.
    """
    by_product = -2 * target.row_weights[:, None] * target.column_weights * residual  # D
    by_left_product = multiply_right(by_product, factors.in_factor.mT)  # D B^T, by A S
    left_product = multiply_left(factors.out_factor, factors.core)  # A S
    rows, columns = factors.out_factor.shape[:2], factors.in_factor.shape[:2]
    return ArmorGradients(
        torch.bmm(by_left_product.view(*rows, -1), factors.core.view(*rows, -1).mT),
        multiply_left(factors.out_factor.mT, by_left_product),
        torch.einsum("rqb,rqc->qbc", left_product.unflatten(1, columns), by_product.unflatten(1, columns)),
    )
