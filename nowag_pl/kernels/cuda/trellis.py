"""The best path of many sequences through a bitshift trellis on CUDA, a step of all sequences at a time.

The costs of a step and the winners of all steps are in the memory of the device; the costs of some hundred sequences
stay in its second cache. A program goes through the 2^k predecessors of some places and keeps the cheapest in
registers, so that no distance is written. Triton comes with the CUDA builds of PyTorch; with TRITON_INTERPRET=1 the
kernels run on a CPU.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_PLACES = 1024  # of a program
_SEQUENCES = 32  # of a program on the way back


def find_path(
    targets: Float[Tensor, "n steps"],
    roots: Float[Tensor, "n steps"] | None,
    values: Float[Tensor, " states"],
    bits: int,
    starts: Int[Tensor, " n"] | None,
    ends: Int[Tensor, " n"] | None,
) -> Int[Tensor, "n steps"]:
    """Return the states of the best path of each sequence, int32.

    Args:
        targets: numbers to come close to, float32.
        roots: square roots of the weights of their squared errors; None for ones.
        values: number that each state stands for, float32.
        bits: k, which a step shifts in.
        starts: L - k bits before the first step; None if they are free.
        ends: low L - k bits of the last state; None if they are free.
    """
    num_sequences, num_steps = targets.shape
    num_places = len(values) >> bits
    targets, values = targets.contiguous(), values.contiguous()
    factors = targets if roots is None else roots.contiguous()
    costs = targets.new_zeros(num_sequences, num_places)
    if starts is not None:
        costs = torch.full_like(costs, torch.inf).scatter_(1, starts.long()[:, None], 0)
    following = torch.empty_like(costs)
    winners = torch.empty(num_steps, num_sequences, num_places, dtype=torch.uint8, device=targets.device)
    size = min(_PLACES, num_places)
    with torch.cuda.device_of(targets):  # Triton launches on the current device
        for step in range(num_steps):
            _advance[(num_sequences, num_places // size)](
                targets,
                factors,
                values,
                costs,
                following,
                winners[step],
                step,
                num_steps,
                num_places,
                BITS=bits,
                SIZE=size,
                WEIGHTED=roots is not None,
                enable_fp_fusion=True,  # multiply and add in one instruction
            )
            costs, following = following, costs
        places = (costs.argmin(dim=1) if ends is None else ends).int().contiguous()
        states = torch.empty(num_sequences, num_steps, dtype=torch.int32, device=targets.device)
        _return[(triton.cdiv(num_sequences, _SEQUENCES),)](
            winners,
            places,
            states,
            num_sequences,
            num_steps,
            num_places,
            BITS=bits,
            SEQUENCES=_SEQUENCES,
            enable_fp_fusion=True,
        )
    return states


@triton.jit
@no_type_check  # Triton compiles the plain function
def _advance(
    targets_ptr,  # [n, steps]
    roots_ptr,  # [n, steps]
    values_ptr,  # [2^L]
    costs_ptr,  # [n, places]
    following_ptr,  # [n, places]
    winners_ptr,  # uint8 [n, places]
    step,
    num_steps,
    num_places,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    target = tl.load(targets_ptr + sequence * num_steps + step)
    root = tl.load(roots_ptr + sequence * num_steps + step) if WEIGHTED else 1.0
    least = tl.full((SIZE,), float("inf"), tl.float32)
    winner = tl.zeros((SIZE,), tl.int32)
    for high in range(1 << BITS):
        state = high * num_places + places
        error = (target - tl.load(values_ptr + state, eviction_policy="evict_last")) * root
        cost = tl.load(costs_ptr + sequence * num_places + (state >> BITS)) + error * error
        winner = tl.where(cost < least, high, winner)
        least = tl.minimum(cost, least)
    tl.store(following_ptr + sequence * num_places + places, least)
    tl.store(winners_ptr + sequence * num_places + places, winner.to(tl.uint8))


@triton.jit
@no_type_check
def _return(
    winners_ptr,  # uint8 [steps, n, places]
    places_ptr,  # int32 [n]
    states_ptr,  # int32 [n, steps]
    num_sequences,
    num_steps,
    num_places,
    BITS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    sequences = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    inside = sequences < num_sequences
    rows = sequences.to(tl.int64)
    places = tl.load(places_ptr + rows, mask=inside, other=0)
    for back in range(num_steps):
        step = num_steps - 1 - back
        winner = tl.load(
            winners_ptr + (rows + step.to(tl.int64) * num_sequences) * num_places + places, mask=inside, other=0
        )
        states = winner.to(tl.int32) * num_places + places
        tl.store(states_ptr + rows * num_steps + step, states, mask=inside)
        places = states >> BITS
