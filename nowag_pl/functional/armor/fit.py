"""ARMOR (arXiv:2510.05528): `W_bar ~ A S B` with block-diagonal A and B around an N:M sparse core S.

Block coordinate descent on the objective of :mod:`nowag_pl.functional.armor.objective`. One iteration is a *continuous*
step, Adam on A, B and the kept values of S, and a *discrete* step (:mod:`nowag_pl.functional.armor.groups`), which
gives one group of every pair of an A-block and a B-block its best support, which never raises the objective.

A continuous step may raise it. Refusing such steps costs quality: the noise of Adam lets supports be chosen again, and
the fit ends 30 % higher without it. The best factors on the way are the result.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from nowag_pl.functional.armor.groups import choose_groups, improve_groups, supports_of
from nowag_pl.functional.armor.objective import (
    ArmorFactors,
    ArmorGradients,
    ArmorTarget,
    gradients_of,
    reconstruct,
)

# Share of the iterations over which the gain is compared with the tolerance.
CHECKS = 10
# A step is taken back where it leads to an objective this many times the best one.
WORST = 2.0
Selection = Literal["gradient", "random"]
Schedule = Literal["cosine", "constant"]


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
        tolerance: stop when a tenth of the iterations lowers the objective by less than this fraction.
        selection: draw groups in proportion to the squared gradient of the objective, or evenly.
        schedule: let the rate fall to zero along a cosine, or keep it.
    """

    pattern: tuple[int, int]
    max_iters: int
    learning_rate: float
    tolerance: float = 0.0
    selection: Selection = "gradient"
    schedule: Schedule = "cosine"


@torch.no_grad()
def fit_armor(
    target: ArmorTarget, start: ArmorFactors, settings: ArmorSettings, generator: torch.Generator
) -> ArmorFit:
    """Lower the objective from a start.

    After a continuous step to twice the best objective, the fit goes back to the best factors; Adam forgets its moments
    and continues with half of the rate.

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
    descent = _Descent(start, settings)
    factors, residual = start, target.weight - reconstruct(start)
    losses = [target.loss(residual)]
    # The factors with the least objective, and the least one after every iteration.
    best, least = start, losses[:]
    window = max(settings.max_iters // CHECKS, 1)
    for iteration in range(1, settings.max_iters + 1):
        gradients = gradients_of(target, factors, residual)
        moved = descent.step(factors, gradients)
        moved_residual = target.weight - reconstruct(moved)
        if target.loss(moved_residual) <= WORST * least[-1]:
            factors, residual = moved, moved_residual
        else:
            factors, residual = best, target.weight - reconstruct(best)
            descent.slow_down()
        by_gradient = gradients.core if settings.selection == "gradient" else None
        groups = choose_groups(factors, group_size, generator, by_gradient)
        # They are large, and not needed by the discrete step.
        del gradients, moved, moved_residual, by_gradient
        factors, residual = improve_groups(target, factors, residual, groups, supports, group_size)
        losses.append(loss := target.loss(residual))
        if loss < least[-1]:
            best = factors
        least.append(min(loss, least[-1]))
        if iteration % window == 0 and least[-1] >= (1 - settings.tolerance) * least[-1 - window]:
            break
    return ArmorFit(best, losses)


class _Descent:
    """Adam on A, B and the kept values of S.

    The diagonals of A and B start at 1, while the scale of S depends on the size of the matrix. The rate of S has the
    same ratio to the root mean square of S as that of A to the root mean square of its blocks, so that a step changes
    all of them by about the same fraction.

    Args:
        start: factors with the shapes of those to move.
        settings: learning rate of A and B at the start, and its schedule.
    """

    def __init__(self, start: ArmorFactors, settings: ArmorSettings) -> None:
        out_factor, core, _, in_factor = (tensor.clone() for tensor in start)
        self._parameters = [out_factor, core, in_factor]
        core_scale = float(core.square().mean().sqrt() / start.out_factor.square().mean().sqrt())
        groups = [
            {"params": [out_factor, in_factor], "lr": settings.learning_rate},
            {"params": [core], "lr": settings.learning_rate * core_scale},
        ]
        self._optimizer = torch.optim.Adam(groups, fused=True)
        self._schedule: LRScheduler = CosineAnnealingLR(self._optimizer, T_max=settings.max_iters)
        if settings.schedule == "constant":
            self._schedule = ConstantLR(self._optimizer, factor=1.0)

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
