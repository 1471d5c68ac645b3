"""A linear's weight on a trellis: NoWag's normalisation, rotation, error feedback, and scales fitted at the end.

1. Columns and rows are divided by their norms (NoWag, arXiv:2504.14569), which leaves two vectors of scales.
2. Random signs and a rotation R on both sides make the entries nearly Gaussian, as the code's values are.
3. Blocks of 16 columns are put on the trellis (QTIP, arXiv:2406.11235), each tile of 16 x 16 as a sequence; the errors
   of each block are fed into those after it. Errors are weighted by their effect on the output: with D the scales of
   the columns and S the signs, `E R S D H D S R E^T`. The scales of the rows cancel.
4. Both vectors of scales are fitted to the output by least squares.

Where the final loss couples outputs, the errors of each tile are fed into those below it as well (YAQA,
arXiv:2505.22988).

Signs, levels and scales end in two vectors, so that only k bits a weight and 16 bits a row and column are stored.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from nowag_pl.functional.feedback import Side, quantize_two_sided, quantize_with_feedback
from nowag_pl.functional.moments import damp, damped_inverse_factor, mean_squares, output_error, two_sided_error
from nowag_pl.functional.normalization import denormalize, normalize
from nowag_pl.functional.scale_fits import fit_in_scale, fit_out_scale
from nowag_pl.functional.trellis.codes import Code, code_values
from nowag_pl.functional.trellis.paths import MEMORY, tail_biting_path
from nowag_pl.functional.trellis.rotation import (
    Rotation,
    hadamard_block,
    random_signs,
    rotate,
    rotate_back,
    rotate_metric,
)
from nowag_pl.functional.trellis.tiles import TILE, from_tiles, pack_states, pad_to_tiles, to_tiles, unpack_states
from nowag_pl.kernels.dispatch import has_module, is_for_triton

# By the bits of a weight: standard deviation of the values at which a unit Gaussian is quantized best, measured with
# `mul1` and 12 state bits; the optimum is flat, and that of other codes and states is 0.3 % lower at most.
SPREAD = (0.9, 1.03, 1.1, 1.15, 1.21, 1.26, 1.33, 1.43)


@dataclass(frozen=True)
class TrellisSettings:
    """Settings by which a weight is put on a trellis.

    Attributes:
        bits: k, bits of a weight, 1 to 8.
        state_bits: L, bits of a state, at most 16.
        code: code that gives the value of a state.
        rotation: "full" for all rows and columns, "both" for blocks of them, or "none" as in the paper of NoWag.
        feedback: let columns compensate for the errors of those before them. Without it, and without rotation, NoWag's
            importance weights the squared errors.
        damping: addition to the diagonal of the metric, as a share of its mean.
        refit_rounds: number of fits of both scales.
        multiple: sizes are padded to a multiple of this: 16, or 128 for the EXL3 format.
        memory: bytes for the search on a GPU.
    """

    bits: int = 2
    state_bits: int = 12
    code: Code = "mul1"
    rotation: Rotation = "full"
    feedback: bool = True
    damping: float = 0.025
    refit_rounds: int = 1
    multiple: int = TILE
    memory: int = MEMORY


class TrellisWeight(NamedTuple):
    """A weight on a trellis; sizes are padded to tiles, and the scales hold the signs of the rotation."""

    packed: Int16[Tensor, "in_tiles out_tiles words"]
    in_scale: Float[Tensor, " padded_in"]
    out_scale: Float[Tensor, " padded_out"]
    shape: tuple[int, int]


def quantize_trellis(
    weight: Float[Tensor, "out in"],
    second_moment: Float[Tensor, "in in"] | Float[Tensor, " in"],
    settings: TrellisSettings,
    generator: torch.Generator,
    table: Float[Tensor, " entries"] | None = None,
    output_moment: Float[Tensor, "out out"] | None = None,
) -> TrellisWeight:
    """Put a weight on a trellis.

    Args:
        weight: W, of any floating type.
        second_moment: H, mean of x x^T, or its diagonal.
        settings: settings of the method.
        generator: generator of the signs.
        table: numbers of the code `table`.
        output_moment: H_O, for feedback along both sides; None for outputs that are not coupled.

    Raises:
        ValueError: H or H_O cannot be inverted, or bits, state bits or code are out of range.
    """
    values = code_values(settings.code, settings.state_bits, table).to(weight.device)
    padded, padding = pad_to_tiles(weight.float(), settings.multiple), -weight.shape[1] % settings.multiple
    moment = _padded(torch.diag(second_moment) if second_moment.dim() == 1 else second_moment, padding)
    target, in_scale, out_scale = _prepare(padded, settings, generator)
    # Stored values stand for numbers that are `step` times larger.
    step = SPREAD[settings.bits - 1] / float(values.std())
    if output_moment is None:
        packed = _search(target / step, moment, in_scale, values, settings)
    else:
        out_moment = _padded(output_moment, -weight.shape[0] % settings.multiple)
        factors = [
            damped_inverse_factor(rotate_metric(each, scale, settings.rotation), settings.damping)[1]
            for each, scale in ((out_moment, out_scale), (moment, in_scale))
        ]
        packed = _search_two_sided(
            target / step, Side.of(factors[0], TILE), Side.of(factors[1], TILE), values, settings
        )
    found = TrellisWeight(packed, in_scale, out_scale * step, (weight.shape[0], weight.shape[1]))
    metrics = moment[: weight.shape[1], : weight.shape[1]], output_moment
    return _refit(weight.float(), found, metrics, values, settings)


def reconstruct(
    weight: TrellisWeight, values: Float[Tensor, " states"], bits: int, rotation: Rotation
) -> Float[Tensor, "out in"]:
    """Return the weight that a packed one stands for, float32: `diag(r2) R Q R diag(r1)`.

    Args:
        weight: packed states and scales.
        values: number of every state.
        bits: k.
        rotation: as it was quantized.
    """
    numbers = decode_tiles(weight.packed, values, bits)
    restored = rotate_back(numbers, weight.out_scale.float(), weight.in_scale.float(), rotation)
    return restored[: weight.shape[0], : weight.shape[1]]


def decode_tiles(
    packed: Int16[Tensor, "in_tiles out_tiles words"], values: Float[Tensor, " states"], bits: int
) -> Float[Tensor, "padded_out padded_in"]:
    """Return the numbers of all tiles as a matrix, without scales and rotation.

    Args:
        packed: from :func:`~nowag_pl.functional.trellis.tiles.pack_states`.
        values: number of every state.
        bits: k.
    """
    if packed.device.type == "cpu" and not values.requires_grad and has_module("numba"):
        from nowag_pl.kernels.cpu.trellis import decode

        return decode(packed, values, bits)
    if is_for_triton(packed.device) and not values.requires_grad:
        from nowag_pl.kernels.cuda.trellis_matmul import decode as decode_on_cuda

        return decode_on_cuda(packed, values, bits)
    states = unpack_states(packed, bits, (len(values) - 1).bit_length())
    return from_tiles(values[states.long()])


def _padded(moment: Tensor, padding: int) -> Tensor:
    """Return second moments, float32, with zeros for what the weight is padded with."""
    return torch.nn.functional.pad(moment.float(), (0, padding, 0, padding))


def _prepare(padded: Tensor, settings: TrellisSettings, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight for the trellis, with a mean square of 1, and the column and row scales that restore it."""
    target, in_scale, out_scale = normalize(padded)
    if settings.rotation != "none":
        out_signs, in_signs = (random_signs(size, generator, padded.device) for size in padded.shape)
        target = rotate(target, out_signs, in_signs, settings.rotation)
        in_scale, out_scale = in_scale * in_signs, out_scale * out_signs
    if settings.rotation == "both":
        # A factor of a whole Hadamard block commutes with the rotation; padding makes them differ.
        in_level = _levels(target, hadamard_block(padded.shape[1]))
        target = target / in_level
        out_level = _levels(target.T, hadamard_block(padded.shape[0]))
        return target / out_level[:, None], in_scale * in_level, out_scale * out_level
    level = _nonzero(target.square().mean().sqrt())
    return target / level, in_scale, out_scale * level


def _levels(matrix: Tensor, block: int) -> Tensor:
    """Return the root mean square of each block of columns, once for every column."""
    return _nonzero(matrix.square().mean(dim=0).unflatten(0, (-1, block)).mean(dim=1).sqrt()).repeat_interleave(block)


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


def _search(target: Tensor, moment: Tensor, in_scale: Tensor, values: Tensor, settings: TrellisSettings) -> Tensor:
    """Return the packed states of a normalised and rotated weight."""
    states = []

    def quantize(columns: slice, target: Tensor, metric: Tensor) -> Tensor:
        tiles = to_tiles(target)[0]
        weights = to_tiles(metric.diagonal().expand(len(target), -1))[0]
        path = tail_biting_path(tiles, values, settings.bits, weights / weights.mean(), settings.memory)
        states.append(path)
        return from_tiles(values[path.long()][None])

    if settings.feedback:
        metric = rotate_metric(moment, in_scale, settings.rotation)
        factor = damped_inverse_factor(metric, settings.damping)[1]
    else:
        rotated = settings.rotation != "none"
        factor = torch.diag(torch.ones_like(in_scale) if rotated else _nonzero(mean_squares(moment)).rsqrt())
    quantize_with_feedback(target, factor, TILE, quantize)
    return pack_states(torch.stack(states), settings.bits)


def _search_two_sided(
    target: Tensor, rows: Side, columns: Side, values: Tensor, settings: TrellisSettings
) -> Int16[Tensor, "in_tiles out_tiles words"]:
    """Return the packed states of a normalised and rotated weight whose outputs are coupled."""
    states = torch.empty(len(columns.feed), len(rows.feed), TILE * TILE, dtype=torch.int32, device=target.device)
    squares = [side.metrics.diagonal(dim1=1, dim2=2) for side in (rows, columns)]  # [blocks, 16]

    def quantize(row: Tensor, column: Tensor, targets: Tensor) -> Tensor:
        weights = to_tiles((squares[0][row, :, None] * squares[1][column, None]).flatten(0, 1))[0]
        weights = weights / weights.mean(dim=1, keepdim=True)
        tiles = to_tiles(targets.flatten(0, 1))[0]
        path = tail_biting_path(tiles, values, settings.bits, weights, settings.memory)
        states[column, row] = path
        return from_tiles(values[path.long()][None]).view_as(targets)

    quantize_two_sided(target, rows, columns, quantize)
    return pack_states(states, settings.bits)


def _refit(
    weight: Tensor,
    found: TrellisWeight,
    metrics: tuple[Tensor, Tensor | None],
    values: Tensor,
    settings: TrellisSettings,
) -> TrellisWeight:
    """Fit the scales by the second moments of inputs and outputs; keep the old ones if the fit is no better."""
    num_out, num_in = found.shape
    damped, coupled = (None if each is None else damp(each, settings.damping) for each in metrics)
    assert damped is not None

    def error_of(in_scale: Tensor, out_scale: Tensor) -> Tensor:
        restored = denormalize(direction, in_scale, out_scale)
        if coupled is not None:
            return two_sided_error(weight, restored, damped, coupled)
        return output_error(weight, restored, damped).sum(dtype=torch.float64)

    ones = found._replace(in_scale=torch.ones_like(found.in_scale), out_scale=torch.ones_like(found.out_scale))
    direction = reconstruct(ones, values, settings.bits, settings.rotation)
    in_scale, out_scale = found.in_scale[:num_in], found.out_scale[:num_out]
    least = error_of(in_scale, out_scale)
    best = found
    for _ in range(settings.refit_rounds):
        in_scale = fit_in_scale(weight, direction, in_scale, out_scale, damped, coupled)
        out_scale = fit_out_scale(weight, direction, in_scale, out_scale, damped, coupled)
        error = error_of(in_scale, out_scale)
        if error < least:
            all_scales = (
                torch.cat([in_scale, found.in_scale[num_in:]]),
                torch.cat([out_scale, found.out_scale[num_out:]]),
            )
            least, best = error, found._replace(in_scale=all_scales[0], out_scale=all_scales[1])
    return best
