import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trellis_oracle import place, stored_state

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.paths import tail_biting_path
from nowag_pl.functional.trellis.tiles import from_tiles, pack_states, pad_to_tiles, to_tiles, unpack_states


def circular_states(num_tiles, bits, state_bits, seed=0):
    """States of random circular streams."""
    symbols = torch.randint(0, 2**bits, (num_tiles, 256), generator=torch.Generator().manual_seed(seed))
    states = torch.zeros_like(symbols)
    for back in range(-(-state_bits // bits)):
        states |= symbols.roll(back, dims=1) << (back * bits)
    return (states % 2**state_bits).int()


def test_tiles_hold_weights_in_the_order_of_tensor_cores():
    weight = torch.arange(32 * 48).view(32, 48)
    tiles = to_tiles(weight)
    assert tiles.shape == (3, 2, 256)
    for step in range(256):
        row, column = place(step)
        assert tiles[2, 1, step] == weight[16 + column, 32 + row]
    assert torch.equal(from_tiles(tiles), weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(8, 16), st.integers(0, 99))
def test_unpacking_undoes_packing(bits, state_bits, seed):
    states = circular_states(6, bits, state_bits, seed).view(2, 3, 256)
    packed = pack_states(states, bits)
    assert packed.dtype == torch.int16
    assert packed.shape == (2, 3, 16 * bits)
    assert torch.equal(unpack_states(packed, bits, state_bits), states)


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 16), (2, 12), (3, 16), (5, 13), (8, 8)])
def test_words_are_read_by_a_scalar_decoder(bits, state_bits):
    states = circular_states(1, bits, state_bits)[0]
    words = pack_states(states, bits).tolist()
    for step in (0, 1, 7, 100, 254, 255):
        assert stored_state(words, step, bits, state_bits) == states[step]


def test_found_paths_survive():
    values = code_values("mul1", 12)
    states = tail_biting_path(torch.randn(4, 256, generator=torch.Generator().manual_seed(0)), values, 3)
    assert torch.equal(unpack_states(pack_states(states, 3), 3, 12), states)


def test_padding_adds_zeros_after_the_weight():
    padded = pad_to_tiles(torch.ones(17, 16))
    assert padded.shape == (32, 16)
    assert padded.sum() == padded[:17].sum() == 17 * 16
    assert pad_to_tiles(torch.ones(17, 16), 128).shape == (128, 128)


def test_message():
    with pytest.raises(ValueError, match="fill words of 32, but got 5 of 3"):
        pack_states(torch.zeros(5, dtype=torch.int32), 3)
