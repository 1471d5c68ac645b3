"""Codes, decoding and the best path, written out for one number at a time in Python's integers."""

import struct
from itertools import product

BYTES = range(0, 32, 8)


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def to_half(number):
    return struct.unpack("<e", struct.pack("<e", number))[0]


def value(code, state):
    """Number that a state stands for."""
    if code == "mul1":
        word = state * 0x83DCD12D % 2**32
        return to_half((1024 + sum(word >> shift & 255 for shift in BYTES)) * half(0x1EEE) + half(0xC931))
    if code == "1mad":
        word = (34038481 * state + 76625530) % 2**32
        return (sum(word >> shift & 255 for shift in BYTES) - 510) / 147.8
    word = (0xCBAC1FED * state if code == "mcg" else 89226354 * state + 64248484) % 2**32
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    return to_half(half(word & 0xFFFF) + half(word >> 16))


def stored_state(words, step, bits, state_bits):
    """State of a step, bit by bit from the 16-bit words of a circular stream, of which each two are swapped."""
    stream = [words[index ^ 1] % 2**16 >> (15 - bit) & 1 for index in range(len(words)) for bit in range(16)]
    end = bits * (step + 1)
    state = 0
    for place in range(end - state_bits, end):
        state = 2 * state + stream[place % len(stream)]
    return state


def place(step):
    """Row and column (input and output) of a step in its tile."""
    lane, index = divmod(step, 8)
    row = 2 * (lane % 4) + (0, 1, 8, 9)[index % 4]
    return row, lane // 4 + (8 if index >= 4 else 0)


def least_cost(targets, weights, values, bits, start=None, end=None):
    """Smallest cost of all paths, each followed by itself; with `start="circular"` of those whose ends meet."""
    state_bits = len(values).bit_length() - 1
    kept = 2 ** (state_bits - bits)
    circular = start == "circular"
    least = float("inf")
    for before in range(kept) if start is None or circular else [start]:
        for symbols in product(range(2**bits), repeat=len(targets)):
            state, cost = before, 0.0
            for symbol, target, weight in zip(symbols, targets, weights, strict=True):
                state = (state * 2**bits + symbol) % len(values)
                cost += weight * (target - values[state]) ** 2
            last = before if circular else end
            if last is None or state % kept == last:
                least = min(least, cost)
    return least
