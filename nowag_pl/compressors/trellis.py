"""NoWag on a trellis: NoWag's normalisation (arXiv:2504.14569), then trellis coded quantization (arXiv:2406.11235)."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from nowag_pl.compressors.base import (
    Compressor,
    check_inputs,
    check_output_moment,
    empty_settings,
    missing_output_moment,
)
from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.ranges import check_real, check_whole
from nowag_pl.functional.trellis.codes import Code
from nowag_pl.functional.trellis.quantize import TrellisSettings, quantize_trellis
from nowag_pl.functional.trellis.rotation import Rotation
from nowag_pl.modules.compressed.trellis import TrellisLinear

_WORKING_BYTES = 40  # per weight: target, rotated weight, tiles, states, and copies for the scales


@dataclass(frozen=True)
class NoWagTrellis(Compressor):
    """Normalise, rotate, and quantize tiles of 16 x 16 weights on a trellis, feeding errors into later columns.

    Args:
        bits: bits per weight, 1 to 8. In addition, each row and column takes 16 bits.
        state_bits: bits of a state of the trellis: 12, or up to 16 for a few percent less error. One more doubles the
            time of the search.
        code: numbers of the states: "mul1", "mcg", "3inst" or "1mad".
        rotation: rotation of rows and columns, after random signs: "full" mixes all of them, "both" only those in a
            Hadamard block, as the EXL3 format does, "none" leaves NoWag's normalised weight as it is.
        feedback: whether later columns make up for the errors of those before them, by the full second moments.
        update: with feedback, "two_sided" to make up for errors along the rows as well, tile by tile, which needs
            calibration.guidance. null: along the columns alone.
        damping: with feedback, what is added to the diagonal of the second moments, as a share of its mean.
        refit_rounds: how often both scales are fitted to the linear's output by least squares.
        multiple: what sizes are padded to: 16, or 128, which `export.format=exl3` asks for beside 16 state bits and the
            rotation "both"; at 128, all Hadamard blocks have that size as well.
        seed: seed of the signs.
    """

    bits: int = 2
    state_bits: int = 12
    code: Code = "mul1"
    rotation: Rotation = "full"
    feedback: bool = True
    damping: float = 0.025
    refit_rounds: int = 1
    multiple: Literal[16, 128] = 16
    seed: int = 0
    update: Literal["two_sided"] | None = None

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a number is out of its range, or a word is unknown.
        """
        for name, (least, most) in {"bits": (1, 8), "state_bits": (8, 16), "refit_rounds": (0, 100)}.items():
            check_whole(name, getattr(self, name), least, most)
        check_whole("seed", self.seed, 0)
        words: dict[str, tuple[object, ...]] = {
            "code": ("mul1", "mcg", "3inst", "1mad"),
            "rotation": get_args(Rotation),
        }
        words |= {"multiple": (16, 128), "update": (None, "two_sided")}
        for name, choices in words.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} to be one of {choices}, but got {getattr(self, name)!r}.")
        check_real("damping", self.damping, above=True)
        if self.update and not self.feedback:
            raise ValueError(f"Expected feedback with update {self.update!r}, but got none.")

    @property
    def full_second_moment(self) -> bool:
        """Whether the matrix of x x^T is needed."""
        return self.feedback

    @property
    def output_moment(self) -> bool:
        """Whether second moments of gradients at the outputs are needed."""
        return self.update == "two_sided"

    def empty(self, shape: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> TrellisLinear:
        """Return the linear on a trellis without values; see :class:`~nowag_pl.compressors.base.Compressor`."""
        padded = [size + -size % self.multiple for size in reversed(shape)]
        own = {"padded": padded, "bits": self.bits, "state_bits": self.state_bits}
        own |= {"code": self.code, "rotation": self.rotation}
        with torch.device("meta"):
            return TrellisLinear.empty({**empty_settings(shape, dtype, bias), **own})

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """Return the memory of the search and of the fit of the scales."""
        num_out, num_in = (size + -size % self.multiple for size in shape)
        return _WORKING_BYTES * num_out * num_in + self.full_moment_bytes(shape)

    def alternatives(self) -> list[dict[str, Any]]:
        """Return other bits, from 1 to 4."""
        return [{"bits": bits} for bits in range(1, 5) if bits != self.bits]

    def compress(self, linear: nn.Linear, second_moment: Tensor) -> TrellisLinear:
        """Put one linear on a trellis; see :class:`~nowag_pl.compressors.base.Compressor`."""
        if self.output_moment:
            raise missing_output_moment()
        return self._compress(linear, second_moment)

    def compress_coupled(self, linear: nn.Linear, second_moment: Tensor, output_moment: Tensor) -> TrellisLinear:
        """Put one linear on a trellis by both of its sides; see :class:`~nowag_pl.compressors.base.Compressor`."""
        check_output_moment(linear, output_moment)
        return self._compress(linear, second_moment, output_moment.to(linear.weight.device))

    @torch.no_grad()
    def _compress(self, linear: nn.Linear, second_moment: Tensor, output_moment: Tensor | None = None) -> TrellisLinear:
        check_inputs(linear, second_moment, self.full_second_moment)
        moment = (second_moment if self.feedback else mean_squares(second_moment)).to(linear.weight.device)
        own = (self.bits, self.state_bits, self.code, self.rotation)
        settings = TrellisSettings(*own, self.feedback, self.damping, self.refit_rounds, self.multiple)
        generator = torch.Generator().manual_seed(self.seed)
        found = quantize_trellis(linear.weight, moment, settings, generator, output_moment=output_moment)
        return TrellisLinear(found, *own, linear.bias, linear.weight.dtype)
