import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.trellis import rotation
from nowag_pl.functional.trellis.rotation import (
    hadamard,
    hadamard_block,
    random_signs,
    rotate,
    rotate_back,
    rotate_metric,
)


def matrix(size):
    """Hadamard blocks by Sylvester's rule: a sign is the parity of the bits that i and j have in common."""
    block = hadamard_block(size)
    entries = torch.zeros(size, size)
    for i in range(size):
        for j in range(i // block * block, (i // block + 1) * block):
            entries[i, j] = (-1) ** ((i % block) & (j % block)).bit_count() / block**0.5
    return entries


@given(st.sampled_from([1, 6, 16, 48, 128, 384]))
def test_hadamard_is_sylvesters_matrix(size):
    rows = torch.randn(3, 2, size)
    torch.testing.assert_close(hadamard(rows), rows @ matrix(size), rtol=0, atol=1e-5)


def test_rotation_keeps_outputs():
    generator = torch.Generator().manual_seed(0)
    weight, factor = torch.randn(32, 48, generator=generator), torch.randn(48, 60, generator=generator)
    out_signs, in_signs = (random_signs(size, generator, weight.device) for size in weight.shape)
    assert set(in_signs.tolist()) == {-1.0, 1.0}
    rotated = rotate(weight, out_signs, in_signs)
    expected = matrix(32) @ torch.diag(out_signs) @ weight @ torch.diag(in_signs) @ matrix(48)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_back(rotated, out_signs, in_signs), weight, rtol=0, atol=1e-5)
    moment = factor @ factor.T / 60
    error = ((weight @ moment) * weight).sum()
    assert ((rotated @ rotate_metric(moment, in_signs)) * rotated).sum() == pytest.approx(error.item(), rel=1e-5)


def test_metric_holds_the_scales_that_follow_the_rotation():
    generator = torch.Generator().manual_seed(1)
    rotated, factor = torch.randn(16, 32, generator=generator), torch.randn(32, 40, generator=generator)
    scale, moment = torch.randn(32, generator=generator), factor @ factor.T
    weight = rotate_back(rotated, torch.ones(16), scale)
    error = ((weight @ moment) * weight).sum().item()
    assert ((rotated @ rotate_metric(moment, scale)) * rotated).sum().item() == pytest.approx(error, rel=1e-5)


def test_signs_follow_the_generator():
    draws = [random_signs(64, torch.Generator().manual_seed(seed), torch.device("cpu")) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_what_is_kept_serves_gradients_and_other_devices():
    rotation._sylvester.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        rotation.hadamard(torch.ones(2, 32))
    rows = torch.ones(2, 32, requires_grad=True)
    rotation.hadamard(rows).sum().backward()
    assert rows.grad.shape == rows.shape
