"""ARMOR (arXiv:2510.05528): `W_bar ~ A S B` with block-diagonal A and B around an N:M sparse core S.

Block coordinate descent on the objective of :mod:`nowag_pl.functional.armor.objective`. One iteration is a *continuous*
step, Adam on A, B and the kept values of S, and a *discrete* step (:mod:`nowag_pl.functional.armor.groups`), which
gives one group of every pair of an A-block and a B-block its best support. Neither raises the objective.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from nowag_pl.functional.armor.groups import choose_groups, improve_groups, supports_of
from nowag_pl.functional.armor.objective import (
    ArmorFactors,
    ArmorGradients,
    ArmorTarget,
    gradients_of,
    reconstruct,
)

# Iterations over which the gain is compared with the tolerance.
CHECK_ITERS = 50
Selection = Literal["gradient", "random"]


class ArmorFit(NamedTuple):
    """Fitted factors, and the objective at the start and after every iteration."""

    factors: ArmorFactors
    losses: list[float]


@dataclass(frozen=True)
class ArmorSettings:
    """Settings of the fit of factors and core.

    Attributes:
        pattern: (N, M) of the core; M divides the blocks of B.
        max_iters: largest number of iterations.
        learning_rate: rate of Adam on A and B; that of S is scaled, see :class:`_Descent`.
        tolerance: stop when 50 iterations lower the objective by less than this fraction; 0 to continue while it falls.
        selection: draw groups in proportion to the squared gradient of the objective, or evenly.
    """

    pattern: tuple[int, int]
    max_iters: int
    learning_rate: float
    tolerance: float = 0.0
    selection: Selection = "gradient"


@torch.no_grad()
def fit_armor(
    target: ArmorTarget, start: ArmorFactors, settings: ArmorSettings, generator: torch.Generator
) -> ArmorFit:
    """Lower the objective from a start.

    The learning rate falls to zero along a cosine. A continuous step that would raise the objective is not taken: Adam
    forgets its moments and continues with half of the rate.

    Args:
        target: the weight to approximate, and the weights of its errors.
        start: factors to start from.
        settings: pattern, steps, and when to stop.
        generator: draws the groups; on the CPU.

    Returns:
        Factors whose objective is not above that of the start, and the objective on the way.

    Raises:
        ValueError: the pattern has more than 256 supports.
    """
    group_size = settings.pattern[1]
    supports = supports_of(settings.pattern).to(target.weight.device)
    descent = _Descent(start, settings.learning_rate, settings.max_iters)
    factors, residual = start, target.weight - reconstruct(start)
    losses = [loss := target.loss(residual)]
    for iteration in range(1, settings.max_iters + 1):
        gradients = gradients_of(target, factors, residual)
        moved = descent.step(factors, gradients)
        moved_residual = target.weight - reconstruct(moved)
        if target.loss(moved_residual) <= loss:
            factors, residual = moved, moved_residual
        else:
            descent.slow_down()
        by_gradient = gradients.core if settings.selection == "gradient" else None
        groups = choose_groups(factors, group_size, generator, by_gradient)
        # They are large, and not needed by the discrete step.
        del gradients, moved, moved_residual, by_gradient
        factors, residual = improve_groups(target, factors, residual, groups, supports, group_size)
        losses.append(loss := target.loss(residual))
        if iteration % CHECK_ITERS == 0 and loss >= (1 - settings.tolerance) * losses[-1 - CHECK_ITERS]:
            break
    return ArmorFit(factors, losses)


class _Descent:
    """Adam on A, B and the kept values of S.

    The diagonals of A and B start at 1, while the scale of S depends on the size of the matrix. The rate of S has the
    same ratio to the root mean square of S as that of A to the root mean square of its blocks, so that a step changes
    all of them by about the same fraction.

    Args:
        start: factors with the shapes of those to move.
        learning_rate: of A and B at the start.
        max_iters: steps over which the rate falls to zero.
    """

    def __init__(self, start: ArmorFactors, learning_rate: float, max_iters: int) -> None:
        out_factor, core, _, in_factor = (tensor.clone() for tensor in start)
        self._parameters = [out_factor, core, in_factor]
        core_scale = float(core.square().mean().sqrt() / start.out_factor.square().mean().sqrt())
        groups = [
            {"params": [out_factor, in_factor], "lr": learning_rate},
            {"params": [core], "lr": learning_rate * core_scale},
        ]
        self._optimizer = torch.optim.Adam(groups, fused=True)
        self._schedule = CosineAnnealingLR(self._optimizer, T_max=max_iters)

    def step(self, factors: ArmorFactors, gradients: ArmorGradients) -> ArmorFactors:
        """Return factors after a step from the given ones; removed weights of the core stay zero."""
        values: list[Tensor] = [factors.out_factor, factors.core, factors.in_factor]
        for parameter, value, gradient in zip(self._parameters, values, gradients, strict=True):
            parameter.copy_(value)
            parameter.grad = gradient
        self._parameters[1].grad = gradients.core * factors.keep
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad()
        out_factor, core, in_factor = self._parameters
        return ArmorFactors(out_factor.clone(), core * factors.keep, factors.keep, in_factor.clone())

    def slow_down(self) -> None:
        """Forget the moments and halve the rate."""
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            group["lr"] /= 2
