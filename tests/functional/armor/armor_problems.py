"""Random problems for the tests of ARMOR."""

import torch
from torch import Tensor

from nowag_pl.functional.armor.objective import ArmorFactors, ArmorTarget
from nowag_pl.functional.pruning import keep_n_of_m


def random_problem(
    rows: int = 6, columns: int = 16, out_block: int = 3, in_block: int = 8, pattern=(2, 4), seed: int = 0
) -> tuple[ArmorTarget, ArmorFactors]:
    """Return a target with uneven weights, and factors that are far from the identity."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    target = ArmorTarget(normal(rows, columns), normal(rows).square() + 0.1, normal(columns).square() + 0.1)
    keep = keep_n_of_m(normal(rows, columns), pattern)
    out_factor = torch.eye(out_block) + 0.5 * normal(rows // out_block, out_block, out_block)
    in_factor = torch.eye(in_block) + 0.5 * normal(columns // in_block, in_block, in_block)
    return target, ArmorFactors(out_factor, normal(rows, columns) * keep, keep, in_factor)


def dense_product(out_factor: Tensor, core: Tensor, in_factor: Tensor) -> Tensor:
    """Return `A S B` by dense matrices."""
    return torch.block_diag(*out_factor) @ core @ torch.block_diag(*in_factor)


def scalar_loss(target: ArmorTarget, reconstruction: Tensor) -> float:
    """Return the objective by loops."""
    weight, rows, columns = (tensor.tolist() for tensor in target)
    return sum(
        rows[i] * columns[j] * (weight[i][j] - float(reconstruction[i, j])) ** 2
        for i in range(len(rows))
        for j in range(len(columns))
    )
