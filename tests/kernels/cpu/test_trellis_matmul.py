import pytest
import torch

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.quantize import decode_tiles
from nowag_pl.kernels.cpu import trellis_matmul


def problem(bits, state_bits, in_tiles=5, out_tiles=3, num_tokens=2):
    """Tokens, packed tiles, and their product by way of the decoded weight."""
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(-(2**15), 2**15, (in_tiles, out_tiles, 16 * bits), generator=generator, dtype=torch.int16)
    tokens = torch.randn(num_tokens, 16 * in_tiles, generator=generator)
    return tokens, packed, tokens @ decode_tiles(packed, code_values("mul1", state_bits), bits).T


@pytest.mark.parametrize("has_byte_sums", [True, False])
@pytest.mark.parametrize(("bits", "state_bits"), [(1, 16), (2, 12), (3, 16), (8, 9)])
def test_products_are_those_of_the_decoded_weight(bits, state_bits, has_byte_sums, monkeypatch):
    if has_byte_sums and not trellis_matmul._HAS_BYTE_SUMS:
        pytest.skip("the processor has no instruction for it")
    monkeypatch.setattr(trellis_matmul, "_HAS_BYTE_SUMS", has_byte_sums)
    trellis_matmul._multiply_kernel.cache_clear()
    tokens, packed, expected = problem(bits, state_bits)
    found = trellis_matmul.multiply(tokens, packed, state_bits)
    trellis_matmul._multiply_kernel.cache_clear()
    # The code's values are rounded to float16, those of the product are not.
    assert (found - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(num_threads):
    tokens, packed, _ = problem(2, 12, out_tiles=7)
    whole = trellis_matmul.multiply(tokens, packed, 12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(trellis_matmul.multiply(tokens, packed, 12), whole)
    finally:
        torch.set_num_threads(before)


def test_token_of_one_input_picks_one_column_of_the_weight():
    _, packed, _ = problem(3, 12)
    weight = decode_tiles(packed, code_values("mul1", 12), 3)
    tokens = torch.zeros(1, 80)
    tokens[0, 37] = 1.0
    torch.testing.assert_close(trellis_matmul.multiply(tokens, packed, 12)[0], weight[:, 37], rtol=2e-3, atol=2e-3)
