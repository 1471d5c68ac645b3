"""Multiply a few tokens by a weight on a trellis without reconstructing it.

With Q the numbers of the tiles, `y = r2 R Q R (r1 x)`: scales and rotations go to the activations and to the
result, and Q is multiplied while it is cut from the streams (:mod:`nowag_pl.kernels.cpu.trellis_matmul` and
:mod:`nowag_pl.kernels.cuda.trellis_matmul`).
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from nowag_pl.functional.trellis.codes import Code, code_values
from nowag_pl.functional.trellis.quantize import TrellisWeight
from nowag_pl.functional.trellis.rotation import Rotation, mixed
from nowag_pl.functional.trellis.tiles import TILE
from nowag_pl.kernels.dispatch import is_for_numba, is_for_triton

# It is faster beyond that, too (docs/trellis.md), but perplexities are measured with the exact weight.
CPU_MAX_TOKENS = 64
# Where reading the packed words, not the products, takes the time.
CUDA_MAX_TOKENS = 32


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
        return None if is_for_triton(device) else f"on {device.type}, without Triton"
    if code != "mul1":
        return f"the code is {code}, not mul1"
    return None if is_for_numba(device, 1, "codes") else "Numba is not installed"


def tiles_matmul(
    activations: Float[Tensor, "*batch in"],
    weight: TrellisWeight,
    state_bits: int,
    rotation: Rotation,
    code: Code = "mul1",
) -> Float[Tensor, "*batch out"]:
    """Multiply activations by the transposed weight, on a CPU with Numba or on CUDA with Triton. Gives no gradients.

    Args:
        activations: any number of tokens, float32, bfloat16 or float16.
        weight: packed tiles, and scales.
        state_bits: L.
        rotation: as it was quantized.
        code: as it was quantized; :func:`reason_against_tiles` has nothing against it.

    Returns:
        The product in the type of the activations.
    """
    num_out, num_in = weight.shape
    tokens = activations.detach().reshape(-1, num_in).float()
    inputs = pad(tokens, (0, len(weight.in_scale) - num_in)) * weight.in_scale.detach()
    outputs = _multiply(mixed(inputs, rotation), weight.packed, state_bits, code)
    outputs = mixed(outputs, rotation) * weight.out_scale.detach()
    return outputs[:, :num_out].to(activations.dtype).reshape(*activations.shape[:-1], num_out)


@lru_cache
def _values(code: Code, state_bits: int, device: torch.device) -> Tensor:
    """Return the number of every state on a device, made once for all linears and tokens."""
    # It is kept, and so must not be of the mode or on the device that happen to be set when it is first needed.
    with torch.inference_mode(False), torch.device("cpu"):
        return code_values(code, state_bits).to(device)


def _multiply(tokens: Tensor, packed: Tensor, state_bits: int, code: Code) -> Tensor:
    if tokens.device.type == "cpu":
        from nowag_pl.kernels.cpu.trellis_matmul import multiply

        return multiply(tokens, packed, state_bits)
    from nowag_pl.kernels.cuda.trellis_matmul import multiply as multiply_on_cuda

    values = _values(code, state_bits, tokens.device)
    return multiply_on_cuda(tokens, packed, values, packed.shape[2] // TILE, code == "mul1")
