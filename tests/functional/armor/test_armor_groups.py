from itertools import combinations

import pytest
import torch
from armor_problems import dense_product, random_problem
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.armor.groups import Groups, choose_groups, improve_groups, supports_of
from nowag_pl.functional.armor.objective import reconstruct


def scalar_step(target, factors, groups, pattern):
    """Try every support of each pair's group on the whole matrix, the pairs one after the other, by least squares."""
    num_kept, size = pattern
    core, keep = factors.core.double().clone(), factors.keep.clone()
    left, right = torch.block_diag(*factors.out_factor.double()), torch.block_diag(*factors.in_factor.double())
    root = (target.row_weights[:, None] * target.column_weights).double().sqrt()
    out_block, in_block = factors.out_factor.shape[1], factors.in_factor.shape[1]
    for p in range(len(factors.out_factor)):
        for q in range(len(factors.in_factor)):
            row = p * out_block + int(groups.row[p, q])
            first = q * in_block + int(groups.number[p, q]) * size
            rest = core.clone()
            rest[row, first : first + size] = 0
            wanted = (root * (target.weight.double() - left @ rest @ right)).flatten()
            best = ((root * (target.weight.double() - left @ core @ right)) ** 2).sum()
            for support in combinations(range(size), num_kept):
                effects = [(root * torch.outer(left[:, row], right[first + j])).flatten() for j in support]
                design = torch.stack(effects, dim=1)
                values = torch.linalg.lstsq(design, wanted[:, None]).solution[:, 0]
                error = (design @ values - wanted).square().sum()
                if error < best:
                    best, core[row, first : first + size] = error, 0
                    keep[row, first : first + size] = False
                    for j, value in zip(support, values, strict=True):
                        core[row, first + j], keep[row, first + j] = value, True
    return core.float(), keep


def some_groups(factors, group_size, seed=0):
    return choose_groups(factors, group_size, torch.Generator().manual_seed(seed))


def improve(target, factors, groups, pattern):
    residual = target.weight - reconstruct(factors)
    return improve_groups(target, factors, residual, groups, supports_of(pattern), pattern[1])


@pytest.mark.parametrize(
    ("pattern", "seed"), [((1, 4), 0), ((2, 4), 1), ((2, 4), 2), ((3, 4), 3), ((4, 4), 4), ((3, 8), 5), ((1, 2), 6)]
)
def test_step_equals_trying_all_supports_by_least_squares(pattern, seed):
    target, factors = random_problem(pattern=pattern, seed=seed)
    groups = some_groups(factors, pattern[1], seed)
    core, keep = scalar_step(target, factors, groups, pattern)
    improved, residual = improve(target, factors, groups, pattern)
    torch.testing.assert_close(improved.core, core, rtol=1e-3, atol=1e-3)
    assert torch.equal(improved.keep, keep)
    assert pattern != (2, 4) or not torch.equal(keep, factors.keep)
    torch.testing.assert_close(residual, target.weight - reconstruct(improved), rtol=1e-4, atol=1e-4)


@given(
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 2)),
    pattern=st.sampled_from([(1, 4), (2, 4), (3, 4)]),
    seed=st.integers(0, 99),
)
def test_loss_never_rises_and_the_pattern_stays(blocks, sizes, pattern, seed):
    in_block = 4 * sizes[1]
    shape = (blocks[0] * sizes[0], blocks[1] * in_block)
    target, factors = random_problem(*shape, sizes[0], in_block, pattern, seed)
    before = [tensor.clone() for tensor in factors]
    improved, residual = improve(target, factors, some_groups(factors, 4, seed), pattern)
    assert target.loss(residual) <= target.loss(target.weight - reconstruct(factors)) * (1 + 1e-6)
    assert (improved.keep.view(-1, 4).sum(dim=1) == pattern[0]).all()
    assert (improved.core[~improved.keep] == 0).all()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(factors, before, strict=True))


def test_settled_group_stays_bit_by_bit():
    target, factors = random_problem()
    groups = some_groups(factors, 4)
    once, residual = improve(target, factors, groups, (2, 4))
    twice, _ = improve_groups(target, once, residual, groups, supports_of((2, 4)), 4)
    torch.testing.assert_close(twice.core, once.core, rtol=1e-4, atol=1e-4)
    assert torch.equal(twice.keep, once.keep)


@pytest.mark.parametrize("dead", [[0], [0, 1, 2], list(range(16))])
def test_channels_without_activations_give_finite_values(dead):
    target, factors = random_problem()
    target.column_weights[dead] = 0
    factors = factors._replace(in_factor=torch.eye(8).repeat(2, 1, 1))
    zero = torch.zeros(2, 2, dtype=torch.long)
    improved, residual = improve(target, factors, Groups(zero, zero), (2, 4))
    assert improved.core.isfinite().all()
    assert improved.core.abs().max() < 100
    assert target.loss(residual) <= target.loss(target.weight - reconstruct(factors)) * (1 + 1e-6)


def test_dead_channels_are_given_up_for_live_ones():
    target, factors = random_problem(2, 4, 2, 4)
    target.column_weights[:2] = 0
    keep = torch.tensor([True, True, False, False]).repeat(2, 1)
    factors = factors._replace(core=target.weight * keep, keep=keep, out_factor=torch.eye(2)[None])
    factors = factors._replace(in_factor=torch.eye(4)[None])
    improved, residual = improve(target, factors, Groups(torch.tensor([[1]]), torch.tensor([[0]])), (2, 4))
    assert improved.keep.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert residual[1, 2:].abs().max() < 1e-4


def test_groups_follow_the_gradient():
    _, factors = random_problem()
    gradient = torch.zeros(6, 16)
    expected = {(0, 0): (1, 1), (0, 1): (2, 0), (1, 0): (0, 0), (1, 1): (2, 1)}
    for (p, q), (row, number) in expected.items():
        gradient[3 * p + row, 8 * q + 4 * number + 2] = -1.0 - p
    for seed in range(5):
        groups = choose_groups(factors, 4, torch.Generator().manual_seed(seed), gradient)
        for (p, q), (row, number) in expected.items():
            assert (int(groups.row[p, q]), int(groups.number[p, q])) == (row, number)


def test_probability_is_the_share_of_the_squared_gradient(generator):
    _, factors = random_problem(2, 4, 2, 4)
    gradient = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 2.0, 0]])  # 1 and 8
    rows = torch.tensor([int(choose_groups(factors, 4, generator, gradient).row) for _ in range(900)])
    assert 770 < int(rows.sum()) < 830


@pytest.mark.parametrize("gradient", [None, torch.zeros(6, 16)])
def test_groups_are_drawn_within_range(gradient, generator):
    _, factors = random_problem()
    drawn = [choose_groups(factors, 4, generator, gradient) for _ in range(100)]
    rows, numbers = torch.stack([g.row for g in drawn]), torch.stack([g.number for g in drawn])
    assert rows.shape == (100, 2, 2)
    if gradient is None:
        assert [rows.unique().tolist(), numbers.unique().tolist()] == [[0, 1, 2], [0, 1]]
        assert len(drawn[0].row.unique()) + len(drawn[1].row.unique()) > 2  # not one draw for all pairs
    assert 0 <= int(rows.min()) <= int(rows.max()) < 3
    assert 0 <= int(numbers.min()) <= int(numbers.max()) < 2


def test_supports_in_order():
    assert supports_of((2, 4)).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert supports_of((4, 4)).tolist() == [[0, 1, 2, 3]]


def test_too_many_supports_are_refused():
    with pytest.raises(ValueError, match=r"at most 256 ways to keep N of M, but got \(8, 16\) with 12870"):
        supports_of((8, 16))


def test_dense_product_is_what_the_step_moves():
    """The update touches one row of A S per pair: by dense products the residual is the same."""
    target, factors = random_problem(seed=3)
    improved, residual = improve(target, factors, some_groups(factors, 4), (2, 4))
    expected = target.weight - dense_product(improved.out_factor, improved.core, improved.in_factor)
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4)
