import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.thumbnails import downsample, even_indices, log_scale, principal_axes, sample


@pytest.mark.parametrize(("shape", "max_size"), [((6, 4), 2), ((7, 5), 3), ((3, 9), 4)])
def test_downsample_averages_cells_that_cover_the_matrix(shape, max_size, generator):
    matrix = torch.rand(shape, generator=generator)
    small = downsample(matrix, max_size)
    rows, columns = (min(size, max_size) for size in shape)
    assert small.shape == (rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, bottom = i * shape[0] // rows, math.ceil((i + 1) * shape[0] / rows)
            left, right = j * shape[1] // columns, math.ceil((j + 1) * shape[1] / columns)
            cell = [float(matrix[r, c]) for r in range(top, bottom) for c in range(left, right)]
            assert float(small[i, j]) == pytest.approx(sum(cell) / len(cell), rel=1e-5)


def test_small_matrix_stays_as_it_is(generator):
    matrix = torch.rand(5, 8, generator=generator)
    assert torch.equal(downsample(matrix, 8), matrix)


def test_no_pixels():
    with pytest.raises(ValueError, match="max_size of at least 1, but got 0"):
        downsample(torch.ones(2, 2), 0)


def test_log_scale_shows_zeros_twelve_decades_below_the_largest():
    shown = log_scale(torch.tensor([[1e-3, 0.0], [1e4, 1e-30]]))
    assert shown.flatten().tolist() == pytest.approx([-3, -8, 4, -8], abs=1e-5)


def test_log_scale_of_nothing_is_finite():
    assert log_scale(torch.zeros(3)).isfinite().all()


@given(st.integers(1, 200), st.integers(1, 50))
def test_even_indices_are_different_and_spread(length, count):
    indices = even_indices(length, count).tolist()
    assert len(indices) == len(set(indices)) == min(length, count)
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] < length
    steps = [after - before for before, after in itertools.pairwise(indices)]
    assert not steps or max(steps) - min(steps) <= 1


def test_sample_takes_values_of_all_the_tensor():
    assert sample(torch.arange(100.0).view(10, 10), 4).tolist() == [0, 25, 50, 75]


def test_principal_axes_are_those_of_the_singular_value_decomposition(generator):
    points = torch.randn(200, 4, generator=generator) * torch.tensor([0.5, 3.0, 1.0, 0.1]) + 7
    mean, axes = principal_axes(points, 3)
    torch.testing.assert_close(mean, points.mean(dim=0))
    expected = torch.linalg.svd(points - points.mean(dim=0)).Vh[:3].T
    torch.testing.assert_close(axes.abs(), expected.abs(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(axes.T @ axes, torch.eye(3), atol=1e-5, rtol=0)
    assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(("shape", "num_axes"), [((0, 3), 2), ((5, 1), 2), ((5, 3), 0)])
def test_too_few_points_or_coordinates(shape, num_axes):
    with pytest.raises(ValueError, match="Expected points of at least"):
        principal_axes(torch.zeros(shape), num_axes)
