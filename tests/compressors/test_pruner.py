import pytest

from nowag_pl.compressors import MagnitudePruner, NoWagPruner, WandaPruner

parametrize = pytest.mark.parametrize("pruner", [MagnitudePruner, WandaPruner, NoWagPruner])


@parametrize
def test_half_is_removed_unless_said_otherwise(pruner):
    assert pruner().sparsity == 0.5
    assert pruner(sparsity=0.0).sparsity == 0.0
    assert pruner(pattern=(1, 4)).sparsity is None


@parametrize
def test_pattern_from_a_list_is_a_tuple(pruner):
    assert pruner(pattern=[2, 4]) == pruner(pattern=(2, 4))
    assert hash(pruner(pattern=[2, 4])) == hash(pruner(pattern=(2, 4)))


@parametrize
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 50.0])
def test_sparsity_out_of_range_is_refused(pruner, sparsity):
    with pytest.raises(ValueError, match=rf"removed.* in \[0, 1\), but got {sparsity}"):
        pruner(sparsity=sparsity)


@parametrize
@pytest.mark.parametrize("pattern", [(5, 4), (0, 4)])
def test_pattern_out_of_range_is_refused(pruner, pattern):
    with pytest.raises(ValueError, match=rf"1 <= N <= M, but got \({pattern[0]}, {pattern[1]}\)"):
        pruner(pattern=pattern)


@parametrize
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sparsity_with_a_pattern_is_refused(pruner, sparsity):
    with pytest.raises(ValueError, match=rf"but got sparsity {sparsity} and pattern \(2, 4\)"):
        pruner(sparsity=sparsity, pattern=(2, 4))
