"""Entropy of importance against scalar loops; learned matrices stay orthogonal and lower it."""

import math

import pytest
import torch

from nowag_pl.functional.rotation_learning import (
    Reader,
    Values,
    Writer,
    importance_entropy,
    learn_rotation,
    principal_axes,
    random_hadamard,
    rotate_values,
    rotated_squares,
    stream_entropy,
    value_entropy,
)


def scalar_entropy(weight, squares):
    rows, columns = weight.shape
    norms = [math.sqrt(sum(weight[i, j] ** 2 for i in range(rows))) or 1 for j in range(columns)]
    scaled = [[float(weight[i, j]) / norms[j] for j in range(columns)] for i in range(rows)]
    lengths = [math.sqrt(sum(x * x for x in row)) or 1 for row in scaled]
    scores = [float(squares[j]) * (scaled[i][j] / lengths[i]) ** 2 for i in range(rows) for j in range(columns)]
    shares = [score / sum(scores) for score in scores]
    return -sum(p * math.log(p) for p in shares if p > 0) - math.log(rows * columns)


def test_entropy_equals_scalar_loops(generator):
    weight, squares = torch.randn(4, 6, generator=generator), torch.rand(6, generator=generator)
    weight[:, 2] = 0
    weight[1] = 0
    assert float(importance_entropy(weight, squares)) == pytest.approx(scalar_entropy(weight, squares), rel=1e-5)


def test_entropy_is_highest_where_all_weights_matter_alike():
    assert float(importance_entropy(torch.ones(3, 5), torch.ones(5))) == pytest.approx(0, abs=1e-6)
    assert float(importance_entropy(torch.zeros(3, 5), torch.ones(5))) <= 0


def stream(generator, size=8):
    inputs = torch.randn(50, size, generator=generator) @ torch.randn(size, size, generator=generator)
    moment = inputs.T @ inputs / 50
    readers = [Reader(torch.randn(6, size, generator=generator), moment) for _ in range(2)]
    writer = Writer(torch.randn(size, 5, generator=generator), torch.rand(5, generator=generator))
    return readers, writer, inputs


def test_stream_entropy_is_that_of_rotated_linears(generator):
    readers, writer, inputs = stream(generator)
    rotation = random_hadamard(8, generator)
    squares = (inputs @ rotation).square().mean(dim=0)
    torch.testing.assert_close(rotated_squares(readers[0].second_moment, rotation), squares)
    parts = [48 * scalar_entropy(reader.weight @ rotation, squares) for reader in readers]
    parts.append(40 * scalar_entropy(rotation.T @ writer.weight, writer.squares))
    assert float(stream_entropy(rotation, readers, [writer])) == pytest.approx(sum(parts) / 136, rel=1e-4)


def test_learning_lowers_the_entropy_and_stays_orthogonal(generator):
    readers, writer, _ = stream(generator)
    start = principal_axes(readers[0].second_moment, generator)
    before = start.clone()

    def gradient(step, rotation):
        leaf = rotation.requires_grad_()
        entropy = stream_entropy(leaf, readers, [writer])
        return float(entropy.detach()), torch.autograd.grad(entropy, leaf)[0]

    torch.testing.assert_close(learn_rotation(start, gradient, 0, 0.01), start)
    learned = learn_rotation(start, gradient, 40, 0.02)
    assert torch.equal(start, before)
    torch.testing.assert_close(learned.T @ learned, torch.eye(8), rtol=0, atol=1e-5)
    entropies = [float(stream_entropy(each, readers, [writer])) for each in (torch.eye(8), start, learned)]
    assert entropies[2] < min(entropies[:2]) - 0.05


def test_principal_axes_are_eigenvectors_in_random_order(generator):
    moment = torch.diag(torch.arange(1.0, 7))
    axes = principal_axes(torch.stack([moment, 2 * moment]), generator)
    torch.testing.assert_close(axes.abs().sum(dim=1), torch.ones(2, 6))
    order = axes[0].abs().argmax(dim=0).tolist()
    assert sorted(order) == list(range(6))
    assert order not in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])


def test_values_of_grouped_heads_keep_the_attention(generator):
    value, output = torch.randn(2, 4, 8, generator=generator), torch.randn(8, 6, 4, generator=generator)
    rotation = torch.stack([random_hadamard(4, generator) for _ in range(2)])
    inputs = torch.randn(8, generator=generator)
    turned, after = rotate_values(rotation, value, output)

    def through(value, output):
        """Each head of the queries reads the head of the values that it belongs to: three in a row share one."""
        heads = [value[head // 3] @ inputs for head in range(6)]
        return sum(output[:, head] @ heads[head] for head in range(6))

    torch.testing.assert_close(through(turned, after), through(value, output))
    assert not torch.allclose(turned, value)


def test_value_entropy_is_that_of_rotated_linears(generator):
    tokens = torch.randn(30, 6, 4, generator=generator)
    moments = torch.einsum("thi,thj->hij", tokens, tokens) / 30
    shapes = torch.randn(2, 4, 8, generator=generator), torch.randn(8, 6, 4, generator=generator)
    values = Values(shapes[0], torch.rand(8, generator=generator), shapes[1], moments)
    rotation = torch.stack([random_hadamard(4, generator) for _ in range(2)])
    value, output = rotate_values(rotation, *shapes)
    squares = torch.stack([(tokens[:, h] @ rotation[h // 3]).square().mean(dim=0) for h in range(6)]).flatten()
    parts = 64 * scalar_entropy(value.flatten(0, 1), values.squares) + 192 * scalar_entropy(output.flatten(1), squares)
    assert float(value_entropy(rotation, values)) == pytest.approx(parts / 256, rel=1e-4)


@pytest.mark.parametrize("size", [8, 12, 7])
def test_random_hadamard_is_orthogonal_and_depends_on_the_seed(size):
    first, same, other = (random_hadamard(size, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    torch.testing.assert_close(first @ first.T, torch.eye(size), rtol=0, atol=1e-6)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    if size == 8:
        torch.testing.assert_close(first.abs(), torch.full((8, 8), 8**-0.5))
