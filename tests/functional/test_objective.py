import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional import chunks
from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.objective import normalized_loss, output_weights, reconstruction_loss, with_mean_one


def scalar_loss(weight, reconstruction, second_moment):
    error = total = 0.0
    for i, row in enumerate(weight):
        for j, value in enumerate(row):
            error += second_moment[j] * (value - reconstruction[i][j]) ** 2
            total += second_moment[j] * value**2
    return error / total


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), seed=st.integers(0, 99))
def test_equals_scalar_loops_and_inputs_stay(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, other = (torch.randn(rows, columns, generator=generator) for _ in range(2))
    second_moment = torch.rand(columns, generator=generator) + 0.1
    before = [tensor.clone() for tensor in (weight, other, second_moment)]
    expected = scalar_loss(weight.tolist(), other.tolist(), second_moment.tolist())
    assert normalized_loss(weight, other, second_moment) == pytest.approx(expected, rel=1e-5)
    assert all(map(torch.equal, before, (weight, other, second_moment)))


def test_exact_is_zero_and_nothing_kept_is_one(generator):
    weight = torch.randn(4, 6, generator=generator)
    second_moment = torch.rand(6, generator=generator)
    assert normalized_loss(weight, weight, second_moment) == 0
    assert normalized_loss(weight, torch.zeros(4, 6), second_moment) == 1


def test_error_in_dead_channels_does_not_count():
    weight = torch.tensor([[1.0, 2.0]])
    assert normalized_loss(weight, torch.tensor([[1.0, 9.0]]), torch.tensor([1.0, 0.0])) == 0


def test_weight_that_counts_for_nothing_gives_zero():
    assert normalized_loss(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(3)) == 0
    assert normalized_loss(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(3)) == 0


def test_output_weights_make_errors_those_of_the_output(generator):
    weight, second_moment = torch.randn(5, 4, generator=generator), torch.rand(4, generator=generator)
    weight[1] *= 10
    normalized = normalize(weight)
    rows, columns = output_weights(normalized.in_scale, normalized.out_scale, second_moment)
    ratios = []
    for i in range(5):
        for j in range(4):
            # An error of 1 in one normalised weight, as it moves the output.
            moved = float(normalized.out_scale[i] * normalized.in_scale[j]) ** 2 * float(second_moment[j])
            ratios.append(float(rows[i] * columns[j]) / moved)
    assert ratios == pytest.approx([ratios[0]] * 20)
    assert (float(rows.mean()), float(columns.mean())) == pytest.approx((1, 1))
    assert torch.equal(with_mean_one(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("chunk_elements", [5, 2**20])
def test_loss_of_matrices_is_that_of_the_normalized_ones(chunk_elements, monkeypatch, generator):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", chunk_elements)
    weight, second_moment = torch.randn(6, 5, generator=generator), torch.rand(5, generator=generator)
    weight[1] *= 100
    reconstruction = torch.where(torch.rand(6, 5, generator=generator) < 0.5, weight, 0)
    dense = normalize(weight)
    rebuilt = reconstruction / dense.in_scale / dense.out_scale[:, None]
    expected = scalar_loss(dense.weight.tolist(), rebuilt.tolist(), second_moment.tolist())
    assert 0.1 < expected < 0.9
    assert reconstruction_loss(weight, reconstruction, second_moment) == pytest.approx(expected, rel=1e-5)
    assert reconstruction_loss(torch.zeros(2, 5), torch.zeros(2, 5), second_moment) == 0
