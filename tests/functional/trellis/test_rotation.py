import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nowag_pl.functional.trellis import rotation
from nowag_pl.functional.trellis.rotation import (
    hadamard_block,
    mixed,
    random_signs,
    rotate,
    rotate_back,
    rotate_metric,
)


def matrix(size, kind):
    """Sylvester's blocks, where a sign is the parity of the bits that i and j share, and Hartley's mixture of them."""
    block = hadamard_block(size)
    entries = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            angle = 2 * math.pi * (i // block) * (j // block) * block / size
            between = (math.cos(angle) + math.sin(angle)) / (size / block) ** 0.5
            same = float(i // block == j // block)
            sign = (-1) ** ((i % block) & (j % block)).bit_count() / block**0.5
            entries[i, j] = sign * (between if kind == "full" else same)
    return entries


@given(st.sampled_from([1, 6, 16, 48, 128, 384]), st.sampled_from(["both", "full"]))
def test_rotation_is_an_involution_of_blocks_and_their_mixture(size, kind):
    rows = torch.randn(3, 2, size)
    torch.testing.assert_close(mixed(rows, kind), rows @ matrix(size, kind), rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed(mixed(rows, kind), kind), rows, rtol=0, atol=1e-5)
    assert mixed(rows, "none") is rows


@pytest.mark.parametrize("kind", ["both", "full"])
def test_rotation_keeps_outputs(kind):
    generator = torch.Generator().manual_seed(0)
    weight, factor = torch.randn(32, 48, generator=generator), torch.randn(48, 60, generator=generator)
    out_signs, in_signs = (random_signs(size, generator, weight.device) for size in weight.shape)
    assert set(in_signs.tolist()) == {-1.0, 1.0}
    rotated = rotate(weight, out_signs, in_signs, kind)
    expected = matrix(32, kind) @ torch.diag(out_signs) @ weight @ torch.diag(in_signs) @ matrix(48, kind)
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rotate_back(rotated, out_signs, in_signs, kind), weight, rtol=0, atol=1e-5)
    moment = factor @ factor.T / 60
    error = ((weight @ moment) * weight).sum()
    assert ((rotated @ rotate_metric(moment, in_signs, kind)) * rotated).sum() == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["both", "full", "none"])
def test_metric_holds_the_scales_that_follow_the_rotation(kind):
    generator = torch.Generator().manual_seed(1)
    rotated, factor = torch.randn(16, 32, generator=generator), torch.randn(32, 40, generator=generator)
    scale, moment = torch.randn(32, generator=generator), factor @ factor.T
    weight = rotate_back(rotated, torch.ones(16), scale, kind)
    error = ((weight @ moment) * weight).sum().item()
    assert ((rotated @ rotate_metric(moment, scale, kind)) * rotated).sum().item() == pytest.approx(error, rel=1e-5)


def test_signs_follow_the_generator():
    draws = [random_signs(64, torch.Generator().manual_seed(seed), torch.device("cpu")) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_what_is_kept_serves_gradients_and_other_devices():
    rotation._sylvester.cache_clear()
    rotation._hartley.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        mixed(torch.ones(2, 96), "full")
    rows = torch.ones(2, 96, requires_grad=True)
    mixed(rows, "full").sum().backward()
    assert rows.grad.shape == rows.shape
