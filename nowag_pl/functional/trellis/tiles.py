"""Weights as tiles of 16 x 16 in the order of tensor cores, and the states of a tile as 16 k words: the EXL3 layout.

A tile is a sequence of 256 weights. For the lanes t = 0 to 31 of a warp, places 8 t to 8 t + 7 hold rows r0, r0 + 1,
r0 + 8, r0 + 9 (r0 = 2 (t mod 4)) of column t div 4, then of the column 8 further on; rows are inputs, columns outputs.
The stream of k-bit symbols, highest bit first, is cut into 32-bit words, which are stored with the low half first.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int, Int16, Shaped
from torch import Tensor

TILE = 16  # rows and columns of a tile
STEPS = TILE * TILE  # weights of a sequence
_WORD = 32


def to_tiles(weight: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "in_tiles out_tiles 256"]:
    """Return the sequences of a weight whose sizes 16 divides.

    Args:
        weight: matrix of any type.
    """
    tiles = weight.T.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2)  # [I, O, in, out]
    return tiles.flatten(2)[..., tile_order().to(weight.device)]


def from_tiles(tiles: Shaped[Tensor, "in_tiles out_tiles 256"]) -> Shaped[Tensor, "out in"]:
    """Undo :func:`to_tiles`.

    Args:
        tiles: sequences of any type.
    """
    matrices = tiles[..., tile_order().argsort().to(tiles.device)].unflatten(2, (TILE, TILE))
    return matrices.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


@lru_cache
def tile_order() -> Int[Tensor, "256"]:
    """Return the place `16 row + column` in its tile of every step of a sequence."""
    step = torch.arange(STEPS)
    lane, index = step // 8, step % 8
    row = 2 * (lane % 4) + index % 2 + 8 * (index // 2 % 2)
    column = lane // 4 + 8 * (index // 4)
    return TILE * row + column


def pack_states(states: Int[Tensor, "*tiles steps"], bits: int) -> Int16[Tensor, "*tiles words"]:
    """Pack circular paths into exactly k bits a step.

    Args:
        states: their low k bits are stored.
        bits: k; `k steps` has to be a multiple of 32.

    Raises:
        ValueError: the bits do not fill whole words.
    """
    if states.shape[-1] * bits % _WORD:
        raise ValueError(f"Expected steps whose bits fill words of {_WORD}, but got {states.shape[-1]} of {bits}.")
    shifts = torch.arange(bits - 1, -1, -1, device=states.device)
    stream = ((states[..., None] >> shifts) & 1).flatten(-2).unflatten(-1, (-1, _WORD))  # [*tiles, words, 32]
    places = torch.arange(_WORD - 1, -1, -1, device=states.device)
    return _signed((stream.long() << places).sum(dim=-1)).view(torch.int16)


def unpack_states(packed: Int16[Tensor, "*tiles words"], bits: int, state_bits: int) -> Int[Tensor, "*tiles steps"]:
    """Undo :func:`pack_states`, int32.

    Args:
        packed: circular streams.
        bits: k.
        state_bits: L, at most 16; it is not part of the stream.
    """
    words = packed.contiguous().view(torch.int32).long() & (2**_WORD - 1)
    double = (words.roll(1, dims=-1) << _WORD) | words  # a word after the one before it
    ends = torch.arange(bits, _WORD * words.shape[-1] + 1, bits, device=packed.device)
    word = (ends - 1) // _WORD
    # The shift is arithmetic, but a state's bits are never the ones that it fills in.
    return ((double[..., word] >> (_WORD * (word + 1) - ends)) & (2**state_bits - 1)).int()


def pad_to_tiles(weight: Float[Tensor, "out in"], multiple: int = TILE) -> Float[Tensor, "padded_out padded_in"]:
    """Return a weight padded with zeros to sizes that are multiples.

    Args:
        weight: matrix.
        multiple: 16, or 128 as the EXL3 format asks for it.
    """
    out_padding, in_padding = (-size % multiple for size in weight.shape)
    return torch.nn.functional.pad(weight, (0, in_padding, 0, out_padding))


def _signed(words: Tensor) -> Tensor:
    """Return 32-bit words as int32."""
    return torch.where(words >= 2 ** (_WORD - 1), words - 2**_WORD, words).int()
