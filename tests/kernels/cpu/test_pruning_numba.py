"""Compiled loops give the bits of the plain paths, which have oracles of their own."""

import pytest
import torch

from nowag_pl.functional.normalization import normalize, norms
from nowag_pl.functional.pruning import (
    keep_n_of_m,
    kept_values,
    normalized_scores,
    nowag_scores,
)
from nowag_pl.functional.storage.packing import pack_keep
from nowag_pl.kernels import dispatch

SHAPES = [(1, 8), (7, 24), (4, 40), (33, 1000)]
PATTERNS = [(2, 4), (1, 4), (3, 4), (4, 4), (4, 8), (3, 8), (2, 3), (8, 16)]


@pytest.fixture(params=[1, 3])
def compiled(request, monkeypatch):
    """Compute with Numba and without it."""
    pytest.importorskip("numba")
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)

    def both(function):
        results = []
        for least in (0, 2**62):
            monkeypatch.setitem(dispatch.PAYS_FROM, "elements", least)
            results.append(function())
        return results

    return both


def random_matrix(shape, generator, dtype=torch.float32):
    return torch.randn(shape, generator=generator).mul_(4).round_().div_(4).to(dtype)  # with ties and zeros


@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, [torch.float32, torch.bfloat16] * 2, strict=True)))
def test_norms_and_scores(shape, dtype, compiled, generator):
    weight, second_moment = random_matrix(shape, generator, dtype), torch.rand(shape[1], generator=generator)
    weight[0], weight[:, 1] = 0, 0
    for actual, expected in zip(*compiled(lambda: norms(weight)), strict=True):
        assert torch.equal(actual, expected)
    actual, expected = compiled(lambda: normalized_scores(weight, second_moment))
    assert torch.equal(actual, expected)
    assert torch.equal(expected, nowag_scores(normalize(weight).weight, second_moment))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_a_pattern_and_their_bytes(pattern, compiled, generator):
    scores = random_matrix((5, 9 * pattern[1]), generator)
    keep, expected = compiled(lambda: keep_n_of_m(scores, pattern))
    assert torch.equal(keep, expected)
    packed, expected = compiled(lambda: pack_keep(keep, pattern))
    assert torch.equal(packed, expected)


def test_a_mask_that_breaks_the_pattern_is_refused(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setitem(dispatch.PAYS_FROM, "elements", 0)
    keep = torch.tensor([[True, True, False, False]]).repeat(9, 2)
    assert len(pack_keep(keep, (2, 4))) == 7
    keep[4, 3] = True
    with pytest.raises(ValueError, match="2 kept of every 4 weights"):
        pack_keep(keep, (2, 4))


@pytest.mark.parametrize(
    ("shape", "dtype", "share"),
    [
        ((1, 1), torch.float32, 1),
        ((7, 24), torch.bfloat16, 0.5),
        ((40, 1000), torch.float64, 0.5),
        ((40, 1000), torch.float32, 0),
        ((40, 1000), torch.bfloat16, 1),
    ],
)
def test_kept_values(shape, dtype, share, compiled, generator):
    weight, keep = random_matrix(shape, generator, dtype), torch.rand(shape, generator=generator) < share
    actual, expected = compiled(lambda: kept_values(weight, keep))
    assert torch.equal(actual, expected)
    assert torch.equal(expected, weight[keep])
