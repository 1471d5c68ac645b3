"""Multiply a few tokens by a weight on a trellis without reconstructing it.

With Q the numbers of the tiles, `y = r2 R Q R (r1 x)`: scales and rotations go to the activations and to the
result, and Q is multiplied while it is cut from the streams (:mod:`nowag_pl.kernels.cpu.trellis_matmul`).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from nowag_pl.functional.trellis.codes import Code
from nowag_pl.functional.trellis.quantize import TrellisWeight
from nowag_pl.functional.trellis.rotation import Rotation, mixed
from nowag_pl.kernels.dispatch import is_for_numba

# It is faster beyond that, too (docs/trellis.md), but perplexities are measured with the exact weight.
CPU_MAX_TOKENS = 64


def reason_against_tiles(code: Code, device: torch.device) -> str | None:
    """Return why :func:`tiles_matmul` cannot be used, or None if it can.

    Args:
        code: what number a state stands for.
        device: where the weight is.

    Example:
        >>> import torch
        >>> reason_against_tiles("mcg", torch.device("cpu"))
        'the code is mcg, not mul1'
    """
    if device.type != "cpu":
        return f"on {device.type}, not on a CPU"
    if code != "mul1":
        return f"the code is {code}, not mul1"
    return None if is_for_numba(device, 1, "codes") else "Numba is not installed"


def tiles_matmul(
    activations: Float[Tensor, "*batch in"],
    weight: TrellisWeight,
    state_bits: int,
    rotation: Rotation,
) -> Float[Tensor, "*batch out"]:
    """Multiply activations by the transposed weight, on a CPU with Numba. Gives no gradients.

    Args:
        activations: any number of tokens, float32, bfloat16 or float16.
        weight: packed tiles of the code `mul1`, and scales.
        state_bits: L.
        rotation: as it was quantized.

    Returns:
        The product in the type of the activations.
    """
    from nowag_pl.kernels.cpu.trellis_matmul import multiply

    num_out, num_in = weight.shape
    tokens = activations.detach().reshape(-1, num_in).float()
    inputs = pad(tokens, (0, len(weight.in_scale) - num_in)) * weight.in_scale.detach()
    outputs = multiply(mixed(inputs, rotation), weight.packed, state_bits)
    outputs = mixed(outputs, rotation) * weight.out_scale.detach()
    return outputs[:, :num_out].to(activations.dtype).reshape(*activations.shape[:-1], num_out)
