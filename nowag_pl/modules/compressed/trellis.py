"""A linear on a trellis: k bits a weight and two vectors of scales, with no codebook to store."""

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from nowag_pl.functional.trellis.codes import STATE_BITS, Code, code_values
from nowag_pl.functional.trellis.matmul import CPU_MAX_TOKENS, CUDA_MAX_TOKENS, reason_against_tiles, tiles_matmul
from nowag_pl.functional.trellis.quantize import TrellisWeight, reconstruct
from nowag_pl.functional.trellis.rotation import Rotation
from nowag_pl.functional.trellis.tiles import STEPS, TILE
from nowag_pl.modules.compressed.base import dtype_name, rounded_to
from nowag_pl.modules.compressed.coded import CodedLinear

# More of its 16 bits are mantissa than bfloat16's; scales need little range.
_STORED_DTYPE = torch.float16


class TrellisLinear(CodedLinear):
    """A linear of which every 16 x 16 weights are a path on a trellis, between two rotations, times both scales.

    A tile takes `16 k` words of 16 bits in the layout of EXL3, held two at a time as int32, which every backend of
    torch.distributed knows. Scales are float32 parameters, so that they can be trained; they hold the signs of the
    rotation, and are rounded to 16 bits at the start and whenever they are stored. A few tokens on a CPU are multiplied
    by the packed tiles; for others the weight is reconstructed.

    Args:
        weight: packed states and scales, of sizes that are padded to tiles.
        bits: k, bits of a weight.
        state_bits: L, bits of a state.
        code: code that gives the value of a state.
        rotation: "full", "both" or "none".
        bias: bias `[out]`, or None.
        dtype: type of the reconstructed weight.
    """

    codes: Tensor

    def __init__(
        self,
        weight: TrellisWeight,
        bits: int,
        state_bits: int,
        code: Code,
        rotation: Rotation,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.bits, self.state_bits, self.code, self.rotation = bits, state_bits, code, rotation
        self.dtype = dtype
        self.in_scale = nn.Parameter(_round(weight.in_scale))
        self.out_scale = nn.Parameter(_round(weight.out_scale))
        self.register_buffer("codes", weight.packed.contiguous().view(torch.int32))  # [in / 16, out / 16, 8 k]

    @property
    def packed(self) -> TrellisWeight:
        """Tiles in 16-bit words, and scales."""
        shape = (self.out_features, self.in_features)
        return TrellisWeight(self.codes.view(torch.int16), self.in_scale, self.out_scale, shape)

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight `[out, in]`."""
        values = code_values(self.code, self.state_bits).to(self.codes.device)
        return reconstruct(self.packed, values, self.bits, self.rotation).to(self.dtype)

    def is_for_codes(self, num_tokens: int, device: torch.device) -> bool:
        """Tell whether so many tokens are multiplied by the packed tiles."""
        most = CPU_MAX_TOKENS if device.type == "cpu" else CUDA_MAX_TOKENS
        return num_tokens <= most and reason_against_tiles(self.code, device) is None

    def from_codes(self, activations: Tensor) -> Tensor:
        """Multiply by the packed tiles; see :class:`~nowag_pl.modules.compressed.coded.CodedLinear`."""
        return tiles_matmul(activations, self.packed, self.state_bits, self.rotation, self.code)

    @property
    def bits_per_weight(self) -> float:
        """Paths, and scales in 16 bits."""
        scales = len(self.in_scale) + len(self.out_scale)
        return (self.codes.numel() * 32 + scales * 16) / (self.out_features * self.in_features)

    @property
    def sparsity(self) -> float:
        """Nothing is removed."""
        return 0.0

    @property
    def gradient_bytes(self) -> int:
        """The numbers of the tiles, before and after the rotation of either side, and the weight, in float32."""
        return 16 * self.in_features * self.out_features

    @property
    def restoring_bytes(self) -> int:
        """The numbers of the tiles in float32, and a rotation of them."""
        return 8 * self.in_features * self.out_features

    def settings(self) -> dict[str, Any]:
        """Return shapes, the trellis, and types."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "padded": [len(self.in_scale), len(self.out_scale)],
            "bits": self.bits,
            "state_bits": self.state_bits,
            "code": self.code,
            "rotation": self.rotation,
            "bias": self.bias_dtype,
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check sizes, types and the trellis.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check_settings(settings)
        if settings["code"] not in get_args(Code) or settings["rotation"] not in get_args(Rotation):
            raise ValueError(
                f"Expected a code among {', '.join(get_args(Code))} and a rotation among "
                f"{', '.join(get_args(Rotation))}, but got "
                f"{settings['code']!r} and {settings['rotation']!r}."
            )
        if settings["state_bits"] not in STATE_BITS or settings["bits"] > settings["state_bits"]:
            raise ValueError(
                f"Expected state_bits in [{STATE_BITS[0]}, {STATE_BITS[-1]}] and no more bits, but got "
                f"{settings['state_bits']} and {settings['bits']}."
            )
        sizes = [settings["in_features"], settings["out_features"]]
        padded = settings["padded"]
        if not isinstance(padded, list) or [type(each) for each in padded] != [int, int]:
            raise ValueError(f"Expected padded to be two sizes, but got {padded!r}.")
        if any(more % TILE or more < size for more, size in zip(padded, sizes, strict=True)):
            raise ValueError(f"Expected padded to be {sizes} made up to multiples of {TILE}, but got {padded}.")

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "TrellisLinear":
        """Return a module with the right shapes and zeros."""
        padded_in, padded_out = settings["padded"]
        words = STEPS * settings["bits"] // 16
        weight = TrellisWeight(
            torch.zeros(padded_in // TILE, padded_out // TILE, words, dtype=torch.int16),
            torch.zeros(padded_in),
            torch.zeros(padded_out),
            (settings["out_features"], settings["in_features"]),
        )
        own = (settings["bits"], settings["state_bits"], settings["code"], settings["rotation"])
        return cls(weight, *own, cls.empty_bias(settings), getattr(torch, settings["dtype"]))

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Scales in 16 bits."""
        return {**super().stored_dtypes, **dict.fromkeys(("in_scale", "out_scale"), _STORED_DTYPE)}


def _round(values: Tensor) -> Tensor:
    """Return float32 values that 16 bits hold exactly."""
    return rounded_to(values, _STORED_DTYPE, torch.float32, "scales")
