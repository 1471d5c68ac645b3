"""A vector-quantized linear: codebook, codes and the two scales of the normalisation."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.chunks import CHUNK_ELEMENTS, fill_rows
from nowag_pl.functional.normalization import denormalize
from nowag_pl.functional.storage.bits import vector_quantized_bits_per_weight
from nowag_pl.functional.storage.packing import MAX_BITS, check_packed, pack, unpack
from nowag_pl.functional.vq.matmul import vq_matmul
from nowag_pl.functional.vq.quantized import Quantized, joined
from nowag_pl.kernels.bits import code_bits
from nowag_pl.modules.compressed.base import CompressedLinear, dtype_name, rounded_to
from nowag_pl.modules.compressed.coded import CodedLinear

# More of its 16 bits are mantissa than bfloat16's; norms and unit vectors need little range.
_STORED_DTYPE = torch.float16


class VQLinear(CodedLinear):
    """A linear in which every `subvector_dim` consecutive weights of a row are a codeword, times both scales.

    Codes are held in packed bytes of `ceil(log2(k))` bits each. Codebook and scales are float32 parameters, so that
    they can be trained; they are rounded to 16 bits at the start and whenever they are stored.

    For few tokens and without gradients the weight is never reconstructed: :mod:`nowag_pl.functional.vq.matmul`.

    Args:
        codebook: codewords `[k, d]` of the normalised weight.
        codes: codeword of each subvector, `[out, ceil(in / d)]`; the last of a row may extend beyond its end.
        in_scale: `[in]`, r1 of the normalisation.
        out_scale: `[out]`, r2 of the normalisation.
        bias: bias `[out]`, or None.
        dtype: type of the reconstructed weight.

    Raises:
        ValueError: the codes do not fit the scales and the codebook.
    """

    codes: Tensor

    def __init__(
        self,
        codebook: Tensor,
        codes: Tensor,
        in_scale: Tensor,
        out_scale: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(len(in_scale), len(out_scale), bias)
        num_codewords, dim = codebook.shape
        shape = (self.out_features, ceil(self.in_features / dim))
        if codes.shape != shape:
            raise ValueError(f"Expected codes of shape {shape}, but got {tuple(codes.shape)}.")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < num_codewords:
            raise ValueError(
                f"Expected codes in [0, {num_codewords}), but got {int(codes.min())} to {int(codes.max())}."
            )
        values = [_round(each) for each in (codebook, in_scale, out_scale)]
        self._hold(values, pack(codes.flatten(), code_bits(num_codewords)), dtype)

    def _hold(self, values: Sequence[Tensor], codes: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        codebook, in_scale, out_scale = values
        self.codebook_size, self.subvector_dim = codebook.shape
        self.codebook = nn.Parameter(codebook)
        self.in_scale = nn.Parameter(in_scale)
        self.out_scale = nn.Parameter(out_scale)
        self.register_buffer("codes", codes)

    @property
    def _codes_shape(self) -> tuple[int, int]:
        return self.out_features, ceil(self.in_features / self.subvector_dim)

    @property
    def unpacked_codes(self) -> Tensor:
        """Codeword of each subvector, int32 `[out, ceil(in / d)]`."""
        count = self._codes_shape[0] * self._codes_shape[1]
        return unpack(self.codes, code_bits(self.codebook_size), count).view(self._codes_shape)

    @property
    def normalized_weight(self) -> Tensor:
        """The quantized normalised weight `[out, in]`."""
        return joined(self.codebook[self.unpacked_codes], self.in_features)

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight `[out, in]`; if it needs no gradients, some rows at a time."""
        if self.gives_gradients() or torch.compiler.is_compiling():
            return denormalize(self.normalized_weight, self.in_scale, self.out_scale).to(self.dtype)
        codes = self.unpacked_codes
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=codes.device)
        return fill_rows(
            weight, lambda rows: Quantized(self.codebook, codes[rows], self.in_scale, self.out_scale[rows]).weight
        )

    @property
    def bits_per_weight(self) -> float:
        """Codes, and codebook and scales in 16 bits."""
        shape = (self.out_features, self.in_features)
        return vector_quantized_bits_per_weight(shape, self.subvector_dim, self.codebook_size)

    @property
    def sparsity(self) -> float:
        """Nothing is removed."""
        return 0.0

    @property
    def codebook_use(self) -> float:
        """Fraction of the codewords that at least one subvector uses."""
        used = torch.zeros(self.codebook_size, dtype=torch.bool, device=self.codes.device)
        for codes in self.unpacked_codes.flatten().split(CHUNK_ELEMENTS):
            used[codes] = True
        return int(used.sum()) / self.codebook_size

    @property
    def gradient_bytes(self) -> int:
        """The codewords, these times a scale, and the weight, in float32; the codes."""
        return round((12 + 4 / self.subvector_dim) * self.in_features * self.out_features)

    @property
    def restoring_bytes(self) -> int:
        """The codes, and some rows of the weight in float32 at a time."""
        return round((2.5 + 10 / self.subvector_dim) * self.in_features * self.out_features)

    def settings(self) -> dict[str, Any]:
        """Return shapes and types."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "subvector_dim": self.subvector_dim,
            "codebook_size": self.codebook_size,
            "bias": self.bias_dtype,
            "dtype": dtype_name(self.dtype),
        }

    @classmethod
    def check_settings(cls, settings: Mapping[str, Any]) -> None:
        """Check sizes and types.

        Raises:
            ValueError: one of them is damaged.
        """
        super().check_settings(settings)
        if settings["codebook_size"] > 2**MAX_BITS:
            raise ValueError(f"Expected codebook_size up to 2^{MAX_BITS}, but got {settings['codebook_size']}.")

    def check(self) -> None:
        """Check the codebook, the scales and the codes.

        Raises:
            ValueError: a value is not finite, or a code is beyond the codebook.
        """
        super().check()
        rows, columns = self._codes_shape
        check_packed(self.codes, self.codebook_size, rows * columns)

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "VQLinear":
        """Return a module with the right shapes and zeros."""
        in_features, out_features = settings["in_features"], settings["out_features"]
        num_codewords, dim = settings["codebook_size"], settings["subvector_dim"]
        num_bits = out_features * ceil(in_features / dim) * code_bits(num_codewords)
        values = [torch.zeros(shape) for shape in ((num_codewords, dim), (in_features,), (out_features,))]
        # Without packing codes that are to be replaced.
        linear = cls.__new__(cls)
        CompressedLinear.__init__(linear, in_features, out_features, cls.empty_bias(settings))
        linear._hold(values, torch.zeros(ceil(num_bits / 8), dtype=torch.uint8), getattr(torch, settings["dtype"]))
        return linear

    @property
    def stored_dtypes(self) -> dict[str, torch.dtype]:
        """Codebook and scales in 16 bits."""
        return {**super().stored_dtypes, **dict.fromkeys(("codebook", "in_scale", "out_scale"), _STORED_DTYPE)}

    def from_codes(self, activations: Tensor) -> Tensor:
        """Multiply few tokens; see :class:`~nowag_pl.modules.compressed.coded.CodedLinear`."""
        return vq_matmul(activations, self.codes, self.codebook, self.in_scale, self.out_scale)


def _round(values: Tensor) -> Tensor:
    """Return float32 values that 16 bits hold exactly."""
    return rounded_to(values, _STORED_DTYPE, torch.float32, "codebook and scales")
