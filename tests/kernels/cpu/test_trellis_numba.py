import pytest
import torch
from trellis_oracle import place, stored_state

from nowag_pl.functional.trellis.codes import code_values
from nowag_pl.functional.trellis.paths import find_path_by_tensors
from nowag_pl.functional.trellis.tiles import from_tiles, unpack_states
from nowag_pl.kernels.cpu.trellis import decode, find_path


@pytest.mark.parametrize(("state_bits", "bits"), [(16, 2), (12, 6), (9, 8), (4, 4)])
def test_states_are_those_of_the_search_by_tensors(state_bits, bits):
    generator = torch.Generator().manual_seed(bits)
    targets, roots = torch.randn(3, 24, generator=generator), torch.rand(3, 24, generator=generator)
    starts = torch.randint(0, 2 ** (state_bits - bits), (3,), generator=generator, dtype=torch.int32)
    arguments = targets, roots, code_values("mcg", state_bits), bits, starts, None
    first, second = find_path(*arguments), find_path_by_tensors(*arguments)
    costs = [(roots * (targets - arguments[2][each.long()])).square().sum(dim=1) for each in (first, second)]
    torch.testing.assert_close(*costs)


def test_arguments_stay_as_they_are():
    targets, roots, values = torch.randn(2, 8), torch.rand(2, 8), code_values("mul1", 8)
    copies = targets.clone(), roots.clone(), values.clone()
    find_path(targets, roots, values, 2, None, None)
    assert all(torch.equal(*pair) for pair in zip(copies, (targets, roots, values), strict=True))


@pytest.mark.parametrize(("bits", "state_bits"), [(1, 16), (2, 12), (3, 16), (7, 10), (8, 8)])
def test_decoding_agrees_with_scalars_and_tensors(bits, state_bits):
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(-(2**15), 2**15, (3, 2, 16 * bits), generator=generator, dtype=torch.int16)
    values = code_values("mul1", state_bits)
    weight = decode(packed, values, bits)
    assert torch.equal(weight, from_tiles(values[unpack_states(packed, bits, state_bits).long()]))
    words = packed[2, 1].tolist()
    for step in range(0, 256, 17):
        row, column = place(step)
        assert weight[16 + column, 32 + row] == values[stored_state(words, step, bits, state_bits)]
