import pytest
import torch
from armor_problems import dense_product, random_problem, scalar_loss

from nowag_pl.functional.armor.objective import gradients_of, identity_factors, reconstruct


@pytest.mark.parametrize(("rows", "out_block", "in_block"), [(6, 3, 8), (6, 1, 4), (6, 6, 16), (5, 5, 8)])
def test_product_and_loss_equal_dense_loops(rows, out_block, in_block):
    target, factors = random_problem(rows, 16, out_block, in_block)
    expected = dense_product(factors.out_factor, factors.core, factors.in_factor)
    torch.testing.assert_close(reconstruct(factors), expected)
    assert target.loss(target.weight - expected) == pytest.approx(scalar_loss(target, expected), rel=1e-5)


def test_gradients_equal_autograd():
    target, factors = random_problem()
    leaves = [tensor.double().requires_grad_() for tensor in (factors.out_factor, factors.core, factors.in_factor)]
    residual = target.weight.double() - dense_product(*leaves)
    (target.row_weights.double() @ residual.square() @ target.column_weights.double()).backward()
    gradients = gradients_of(target, factors, target.weight - reconstruct(factors))
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad.float(), rtol=1e-4, atol=1e-3)


def test_start_is_the_pruned_weight():
    target, factors = random_problem()
    start = identity_factors(target.weight, factors.keep, 2, 4)
    assert start.out_factor.shape == (3, 2, 2)
    assert start.in_factor.shape == (4, 4, 4)
    assert torch.equal(reconstruct(start), target.weight * factors.keep)
