import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.modules import CrossMoment, SecondMoment


def observe(*batches):
    moment = SecondMoment(batches[0].shape[-1])
    for batch in batches:
        moment.update(batch)
    return moment


@given(
    sequences=st.integers(1, 4),
    tokens=st.integers(1, 5),
    features=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_equals_scalar_loops_and_input_stays(sequences, tokens, features, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(sequences, tokens, features, generator=generator).to(dtype)
    before = activations.clone()
    expected = [
        sum(float(activations[s, t, j]) ** 2 for s in range(sequences) for t in range(tokens)) / (sequences * tokens)
        for j in range(features)
    ]
    mean = observe(activations).compute()
    assert mean.dtype == torch.float32
    assert mean.tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(activations, before)


def test_batches_count_by_their_tokens_in_any_order(generator):
    tokens = torch.randint(-9, 9, (17, 3), generator=generator).float()
    batches = tokens.split([1, 9, 2, 5])
    whole = observe(tokens).compute()
    assert torch.equal(observe(*batches).compute(), whole)
    assert torch.equal(observe(*reversed(batches)).compute(), whole)


def test_merge_equals_one_pass_and_leaves_the_other(generator):
    tokens = torch.randint(-9, 9, (11, 3), generator=generator).float()
    first, second = observe(tokens[:2]), observe(tokens[2:])
    before = second.compute()
    first.merge(second)
    assert torch.equal(first.compute(), observe(tokens).compute())
    assert torch.equal(second.compute(), before)


def test_merge_of_other_features_is_refused():
    moment = observe(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \(3,\), but got \(1,\)"):
        moment.merge(observe(torch.ones(2, 1)))


def test_small_squares_are_not_lost_beside_large_ones():
    tokens = torch.ones(1, 1)
    moment = observe(torch.full((1, 1), 2.0**13))
    for _ in range(64):
        moment.update(tokens)
    assert moment.total.item() == 2.0**26 + 64


def test_all_reduce_without_a_process_group_changes_nothing():
    moment = observe(torch.ones(2, 3))
    moment.all_reduce()
    assert moment.compute().tolist() == [1.0, 1.0, 1.0]
    assert moment.num_tokens == 2


def test_all_reduce_adds_sums_and_tokens(monkeypatch):
    moment, other_rank = observe(torch.tensor([[1.0], [3.0]])), observe(torch.tensor([[5.0]]))
    partners = {id(moment.total): other_rank.total, id(moment.num_tokens): other_rank.num_tokens}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(partners[id(tensor)]))
    moment.all_reduce()
    assert moment.compute().item() == pytest.approx(35 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_and_counted(bad):
    moment = observe(torch.tensor([[1.0, bad, 2.0]]), torch.ones(1, 3))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 input features"):
        moment.compute()


def test_nothing_observed_is_refused():
    with pytest.raises(RuntimeError, match="at least one update before compute"):
        SecondMoment(3).compute()


def test_other_features_are_refused():
    with pytest.raises(ValueError, match="activations of 3 features, but got 4"):
        SecondMoment(3).update(torch.ones(2, 4))


def test_keeps_no_graph():
    moment = observe(torch.ones(2, 3, requires_grad=True))
    assert not moment.compute().requires_grad


def test_state_restores():
    restored = SecondMoment(2)
    restored.load_state_dict(observe(torch.tensor([[1.0, 2.0], [3.0, 0.0]])).state_dict())
    assert restored.compute().tolist() == [5.0, 2.0]


def test_full_matrix_is_the_mean_of_the_products_in_any_batches():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(5, 7, 3, generator=generator)
    tokens = activations.double().flatten(0, 1)
    whole, parts = SecondMoment(3, full=True), SecondMoment(3, full=True)
    whole.update(activations)
    for part in activations.split(2):
        other = SecondMoment(3, full=True)
        other.update(part)
        parts.merge(other)
    torch.testing.assert_close(whole.compute().double(), tokens.T @ tokens / 35, rtol=1e-6, atol=1e-6)
    assert torch.equal(whole.compute(), parts.compute())
    torch.testing.assert_close(whole.compute().diagonal(), observe(activations).compute())
    assert int(whole.num_tokens) == 35


def test_full_matrix_of_bad_activations_is_refused():
    moment = SecondMoment(3, full=True)
    moment.update(torch.tensor([[1.0, float("inf"), 0.0]]))
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 3 input features"):
        moment.compute()


def test_full_and_squares_do_not_merge():
    with pytest.raises(ValueError, match=r"shape \(3, 3\), but got \(3,\)"):
        SecondMoment(3, full=True).merge(SecondMoment(3))


@given(batches=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_mean_of_products_is_that_of_a_loop(batches, seed):
    generator = torch.Generator().manual_seed(seed)
    moment, expected, count = CrossMoment(2, 3), torch.zeros(2, 3, dtype=torch.float64), 0
    for batch in batches:
        rows = torch.randn(batch, 5, 2, generator=generator)
        columns = torch.randn(batch, 5, 3, generator=generator)
        moment.update(rows, columns)
        for a, b in zip(rows.flatten(0, 1).double(), columns.flatten(0, 1).double(), strict=True):
            expected += torch.outer(a, b)
            count += 1
    assert int(moment.num_tokens) == count
    assert moment.compute().dtype == torch.float32
    torch.testing.assert_close(moment.compute().double(), expected / count, rtol=1e-5, atol=1e-6)


def test_products_of_tokens_without_a_batch_are_one_sequence():
    rows, columns = torch.randn(6, 2), torch.randn(6, 3)
    moment = CrossMoment(2, 3)
    moment.update(rows.bfloat16(), columns)
    torch.testing.assert_close(moment.compute(), rows.bfloat16().float().T @ columns / 6)


def test_products_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="zip"):
        CrossMoment(2, 3).update(torch.ones(2, 5, 2), torch.ones(3, 5, 3))


def test_products_of_bfloat16_numbers_are_exact():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 64, 96, generator=generator).bfloat16()
    moment, cross = SecondMoment(96, full=True), CrossMoment(96, 96)
    moment.update(activations)
    cross.update(activations, activations)
    flat = activations.flatten(0, 1).double()
    expected = (flat.T @ flat / len(flat)).float()
    torch.testing.assert_close(moment.compute(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cross.compute(), expected, rtol=1e-5, atol=1e-5)
    assert torch.get_float32_matmul_precision() == "highest"
