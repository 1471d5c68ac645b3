"""Values of the states of a trellis: fixed pseudo-random codes (QTIP, arXiv:2406.11235), and a table.

A code maps the L-bit states to values that look like draws from a unit Gaussian, by a few operations on 32-bit
integers, so that nothing has to be stored. `mul1` and `mcg` are those of the EXL3 format, `1mad` and `3inst` the ones
of the paper. Roundings to float16 are those of the format, bit for bit. `table` looks up 2^Q numbers in a pseudo-random
order, and can be trained (the paper's hybrid code, one weight at a time).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

Code = Literal["mul1", "mcg", "3inst", "1mad", "table"]
STATE_BITS = range(4, 17)
TABLE_BITS = 9  # Q of the paper
_WORD = 2**32 - 1
_HALF_FACTOR, _HALF_OFFSET = 0x1EEE, 0xC931  # 1 / 147.7 and -10.38, which takes 1024 + 510 to 0


class TablePlaces(NamedTuple):
    """Where each state looks its number up."""

    entry: Int[Tensor, " states"]
    sign: Float[Tensor, " states"]


def code_values(
    code: Code, state_bits: int, table: Float[Tensor, " entries"] | None = None
) -> Float[Tensor, " states"]:
    """Return the number of every state, float32; differentiable in the table.

    Args:
        code: name of the code.
        state_bits: L.
        table: numbers of the code `table`, 2^Q of them; None for those of a half Gaussian.

    Raises:
        ValueError: there is no such code, `state_bits` is out of range, or there is a table for another code.

    Example:
        >>> code_values("mul1", 16)[:2].tolist()
        [-3.453125, 0.64111328125]
    """
    if code not in get_args(Code):
        raise ValueError(f"Expected a code among {', '.join(get_args(Code))}, but got {code!r}.")
    if state_bits not in STATE_BITS:
        raise ValueError(f"Expected state_bits in [{STATE_BITS[0]}, {STATE_BITS[-1]}], but got {state_bits}.")
    if code == "table":
        table = initial_table() if table is None else table
        entry, sign = table_places(state_bits, (len(table) - 1).bit_length())
        return sign.to(table.device) * table.float()[entry.to(table.device)]
    if table is not None:
        raise ValueError(f"Expected a table for the code 'table' only, but got one for {code!r}.")
    return _CODES[code](torch.arange(2**state_bits))


def initial_table(table_bits: int = TABLE_BITS) -> Float[Tensor, " entries"]:
    """Return the middles of 2^Q parts of a half Gaussian that are equally likely, float32.

    Args:
        table_bits: Q.
    """
    likelihood = (torch.arange(2**table_bits, dtype=torch.float64) + 0.5) / 2**table_bits
    return torch.special.ndtri(0.5 + likelihood / 2).float()


def table_places(state_bits: int, table_bits: int) -> TablePlaces:
    """Return entry and sign of each state x: Q bits of `x^2 + x` under its bit 15, and that bit.

    Args:
        state_bits: L.
        table_bits: Q, at most 15.
    """
    states = torch.arange(2**state_bits)
    mixed = states * states + states
    entry = (mixed >> (15 - table_bits)) & (2**table_bits - 1)
    return TablePlaces(entry, 1 - 2 * ((mixed >> 15) & 1).float())


def _mul1(states: Tensor) -> Tensor:
    # 0x6400 is 1024 as a half, with steps of 1 above it; a fused multiply-add rounds once.
    total = 1024 + _byte_sum((0x83DCD12D * states) & _WORD)
    factor, offset = (_halves(torch.tensor([bits])).double() for bits in (_HALF_FACTOR, _HALF_OFFSET))
    return (total.double() * factor + offset).half().float()


def _one_mad(states: Tensor) -> Tensor:
    total = _byte_sum((34038481 * states + 76625530) & _WORD)
    return ((total - 510).double() / 147.8).float()


def _three_instructions(states: Tensor) -> Tensor:
    return _sum_of_halves((89226354 * states + 64248484) & _WORD)


def _mcg(states: Tensor) -> Tensor:
    return _sum_of_halves((0xCBAC1FED * states) & _WORD)


def _byte_sum(words: Tensor) -> Tensor:
    return sum(((words >> shift) & 0xFF for shift in (8, 16, 24)), words & 0xFF)


def _sum_of_halves(words: Tensor) -> Tensor:
    mixed = (words & 0x8FFF8FFF) ^ 0x3B603B60
    return (_halves(mixed & 0xFFFF).float() + _halves(mixed >> 16).float()).half().float()


def _halves(bits: Tensor) -> Tensor:
    """Return the float16 numbers that have these 16 bits."""
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(torch.float16)


_CODES: dict[str, Callable[[Tensor], Tensor]] = {
    "mul1": _mul1,
    "mcg": _mcg,
    "3inst": _three_instructions,
    "1mad": _one_mad,
}
