"""The best path through a bitshift trellis (Viterbi), open or with its ends joined (QTIP, arXiv:2406.11235).

A state is a window of L bits of the stream; a step shifts k bits in, `(state << k mod 2^L) + c`, and stands for the
number `values[state]`. The number does not depend on the state before, so that a step costs O(2^L): of the 2^k states
that lead to the same ones, the cheapest stays. The cost of a path is `sum_t w_t (x_t - values[state_t])^2`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nowag_pl.kernels.dispatch import has_module

MEMORY = 2**30  # bytes for the work of a device; a CPU's compiled loop takes 1.5 MiB a thread at most


def open_path(
    targets: Float[Tensor, "n steps"],
    values: Float[Tensor, " states"],
    bits: int,
    weights: Float[Tensor, "n steps"] | None = None,
    starts: Int[Tensor, " n"] | None = None,
    ends: Int[Tensor, " n"] | None = None,
    memory: int = MEMORY,
) -> Int[Tensor, "n steps"]:
    """Return the states of the cheapest path of each sequence, int32.

    Args:
        targets: x.
        values: number of every state, 2^L of them.
        bits: k.
        weights: w, not negative; None for ones.
        starts: the L - k bits before the first step; None if they are free.
        ends: the low L - k bits of the last state; None if they are free.
        memory: bytes that the work may take on a GPU, or without Numba; one sequence is the least.

    Raises:
        ValueError: the number of values is no power of two, or `bits` is out of range.

    Example:
        >>> import torch
        >>> values = torch.tensor([0.0, 1.0, 5.0, 3.0])
        >>> open_path(torch.tensor([[1.0, 3.0, 5.0]]), values, bits=1).tolist()
        [[1, 3, 2]]
    """
    state_bits = _state_bits(values, bits)
    targets = targets.float()
    roots = None if weights is None else weights.float().sqrt()
    arguments = targets, roots, values.float(), bits, starts, ends
    if targets.device.type == "cpu" and has_module("numba"):
        from nowag_pl.kernels.cpu.trellis import find_path

        return find_path(*arguments)
    size = max(memory // _bytes_of_one(targets.shape[1], state_bits, bits), 1)
    if targets.device.type == "cuda" and has_module("triton"):
        from nowag_pl.kernels.cuda.trellis import find_path
    else:
        find_path = find_path_by_tensors
    pieces = zip(*(_split(each, size, len(targets)) for each in (targets, roots, starts, ends)), strict=True)
    found = [find_path(x, root, values.float(), bits, start, end) for x, root, start, end in pieces]
    return torch.cat(found)


def tail_biting_path(
    targets: Float[Tensor, "n steps"],
    values: Float[Tensor, " states"],
    bits: int,
    weights: Float[Tensor, "n steps"] | None = None,
    memory: int = MEMORY,
) -> Int[Tensor, "n steps"]:
    """Return the states of a cheap path whose stream is circular, int32; `k steps` bits determine all of them.

    The path is not always the cheapest: the L - k bits at the seam are those in the middle of the best open path of the
    sequence rotated by half.

    Args:
        targets: x; their number of steps has to give at least L bits.
        values: number of every state, 2^L of them.
        bits: k.
        weights: w, not negative; None for ones.
        memory: bytes, as in :func:`open_path`.

    Raises:
        ValueError: as in :func:`open_path`, or the sequences are too short.
    """
    num_steps, state_bits = targets.shape[1], _state_bits(values, bits)
    if num_steps * bits < state_bits:
        raise ValueError(f"Expected sequences of at least {state_bits} bits, but got {num_steps} steps of {bits}.")
    middle = num_steps // 2
    turned, turned_weights = (None if each is None else each.roll(-middle, dims=1) for each in (targets, weights))
    assert turned is not None
    path = open_path(turned, values, bits, turned_weights, memory=memory)
    seam = path[:, num_steps - middle - 1] & (2 ** (state_bits - bits) - 1)
    return open_path(targets, values, bits, weights, starts=seam, ends=seam, memory=memory)


def find_path_by_tensors(
    targets: Float[Tensor, "n steps"],
    roots: Float[Tensor, "n steps"] | None,
    values: Float[Tensor, " states"],
    bits: int,
    starts: Int[Tensor, " n"] | None,
    ends: Int[Tensor, " n"] | None,
) -> Int[Tensor, "n steps"]:
    """As the kernels, but one step of all sequences at a time, on any device.

    Args:
        targets: x, float32.
        roots: square roots of the weights; None for ones.
        values: number of every state.
        bits: k.
        starts: bits before the first step; None if they are free.
        ends: bits of the last state; None if they are free.
    """
    num_sequences, num_steps = targets.shape
    num_places = len(values) >> bits
    costs = targets.new_zeros(num_sequences, num_places)
    if starts is not None:
        costs = torch.full_like(costs, torch.inf).scatter_(1, starts.long()[:, None], 0)
    winners = torch.empty(num_steps, num_sequences, num_places, dtype=torch.uint8, device=targets.device)
    for step in range(num_steps):
        error = targets[:, step, None] - values
        error = error if roots is None else error * roots[:, step, None]
        reached = (error.square().unflatten(1, (num_places, 2**bits)) + costs[:, :, None]).view(
            num_sequences, 2**bits, num_places
        )
        costs, winner = reached.min(dim=1)
        winners[step] = winner
    place = costs.argmin(dim=1) if ends is None else ends.long()
    states = torch.empty(num_sequences, num_steps, dtype=torch.int32, device=targets.device)
    for step in reversed(range(num_steps)):
        state = winners[step].gather(1, place[:, None]).squeeze(1).long() * num_places + place
        states[:, step] = state
        place = state >> bits
    return states


def _split(each: Tensor | None, size: int, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * max(-(-count // size), 1) if each is None else each.split(size)


def _bytes_of_one(num_steps: int, state_bits: int, bits: int) -> int:
    """Return the approximate memory for a sequence: the winners of all steps, and a few numbers for each state."""
    return num_steps * 2 ** (state_bits - bits) + 16 * 2**state_bits


def _state_bits(values: Tensor, bits: int) -> int:
    state_bits = len(values).bit_length() - 1
    if len(values) != 2**state_bits:
        raise ValueError(f"Expected 2^L values, but got {len(values)}.")
    if not 1 <= bits <= min(8, state_bits):
        raise ValueError(f"Expected bits in [1, {min(8, state_bits)}], but got {bits}.")
    return state_bits
