import numpy as np
import pytest
import torch

from nowag_pl.functional import sparsegpt
from nowag_pl.functional.moments import output_error
from nowag_pl.functional.pruning import keep_largest, keep_n_of_m, wanda_scores
from nowag_pl.functional.sparsegpt import prune_with_feedback


def problem(num_out, num_in, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * num_in, num_in, generator=generator) @ torch.randn(num_in, num_in, generator=generator)
    return torch.randn(num_out, num_in, generator=generator), inputs.T @ inputs / len(inputs)


def scalar_sparsegpt(weight, second_moment, damping, num_removed, group, per_row):
    """The published loop: a column at a time, with the inverse of what is left of H."""
    weight, matrix = weight.double().numpy().copy(), second_moment.double().numpy()
    matrix = matrix + damping * np.mean(np.diag(matrix)) * np.eye(len(matrix))
    keep = np.ones(weight.shape, dtype=bool)
    for j in range(weight.shape[1]):
        if j % group == 0:
            columns = range(j, min(j + group, weight.shape[1]))
            # Each column's score takes it to be the first of those that are left.
            inverses = {c: np.linalg.inv(matrix[c:, c:])[0, 0] for c in columns}
            scores = np.array([[weight[i, c] ** 2 / inverses[c] for c in columns] for i in range(len(weight))])
            if per_row:
                for i, row in enumerate(scores):
                    keep[i, j + np.argsort(row, kind="stable")[:num_removed]] = False
            else:
                count = round(num_removed * scores.size)
                for place in np.argsort(scores, axis=None)[:count]:
                    keep[place // len(columns), j + place % len(columns)] = False
        inverse = np.linalg.inv(matrix[j:, j:])
        error = np.where(keep[:, j], 0, weight[:, j]) / inverse[0, 0]
        weight[:, j:] -= error[:, None] * inverse[0]
    return weight, keep


@pytest.mark.parametrize("block", [4, 128])
def test_half_of_each_block_as_published(block, monkeypatch):
    monkeypatch.setattr(sparsegpt, "MASK_BLOCK", block)
    weight, second_moment = problem(5, 10)
    pruned, keep = prune_with_feedback(weight, second_moment, 0.5, None, 0.01)
    expected, expected_keep = scalar_sparsegpt(weight, second_moment, 0.01, 0.5, block, per_row=False)
    assert keep.tolist() == expected_keep.tolist()
    torch.testing.assert_close(pruned.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
    assert (pruned[~keep] == 0).all()


def test_patterns_as_published():
    weight, second_moment = problem(3, 12)
    pruned, keep = prune_with_feedback(weight, second_moment, None, (1, 4), 0.01)
    expected, expected_keep = scalar_sparsegpt(weight, second_moment, 0.01, 3, 4, per_row=True)
    assert keep.tolist() == expected_keep.tolist()
    torch.testing.assert_close(pruned.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.5, None), (None, (2, 4))])
def test_output_is_nearer_than_without_an_update(sparsity, pattern):
    weight, second_moment = problem(16, 32)
    pruned, _ = prune_with_feedback(weight, second_moment, sparsity, pattern, 0.01)
    scores = wanda_scores(weight, second_moment.diagonal())
    keep = keep_n_of_m(scores, pattern) if pattern else keep_largest(scores, sparsity)
    without = output_error(weight, weight * keep, second_moment).sum()
    assert output_error(weight, pruned, second_moment).sum() < 0.9 * without
