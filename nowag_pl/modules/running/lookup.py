"""A vector-quantized linear that decodes few tokens fast on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nowag_pl.functional.chunks import fill_rows
from nowag_pl.functional.storage.packing import pack
from nowag_pl.functional.vq.matmul import (
    CPU_MAX_LOOKUP_TOKENS,
    code_columns,
    codeword_table,
    codewords_of,
    columns_matmul,
)
from nowag_pl.functional.vq.quantized import Quantized
from nowag_pl.kernels.bits import code_bits
from nowag_pl.modules.compressed.coded import CodedLinear
from nowag_pl.modules.compressed.vq import VQLinear
from nowag_pl.modules.running.base import RunningLinear


class LookupLinear(RunningLinear, CodedLinear):
    """A :class:`VQLinear` for inference on a CPU: a code takes one byte or two, and codes are stored by columns.

    That is `8 / d` or `16 / d` bits a weight in memory; in files, codes are packed. More than a few tokens take the
    unpacked weight, if the linear had one.

    Args:
        linear: the linear, for which :func:`~nowag_pl.functional.vq.matmul.reason_against_columns` finds none.
    """

    columns: Tensor
    table: Tensor

    def __init__(self, linear: VQLinear) -> None:
        super().__init__(linear)
        self.dtype = linear.dtype
        self.codebook_shape = (linear.codebook_size, linear.subvector_dim)
        self.in_scale = nn.Parameter(linear.in_scale.detach(), requires_grad=False)
        self.out_scale = nn.Parameter(linear.out_scale.detach(), requires_grad=False)
        columns = code_columns(linear.unpacked_codes, linear.codebook_size)
        self.register_buffer("columns", columns, persistent=False)
        # Nothing of this form is ever written to.
        self._unpacked = linear._unpacked
        self.register_buffer("table", codeword_table(linear.codebook, linear.out_features), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """The codewords `[k, d]`."""
        return codewords_of(self.table, *self.codebook_shape)

    @property
    def weight(self) -> Tensor:
        """The reconstructed weight `[out, in]`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        return fill_rows(weight, self._rows)

    def _rows(self, rows: slice) -> Tensor:
        codes = self.columns[:, rows].T.int()
        return Quantized(self.codebook, codes, self.in_scale, self.out_scale[rows]).weight

    def stored_state(self) -> dict[str, Tensor]:
        """Return the packed codes and the codebook."""
        codes = pack(self.columns.T.flatten().int(), code_bits(self.codebook_shape[0]))
        return {"codebook": self.codebook.contiguous(), "codes": codes}

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "LookupLinear":
        """Return a module with the right shapes and zeros."""
        return cls(VQLinear.empty(settings))

    def is_for_codes(self, num_tokens: int, device: torch.device) -> bool:
        """Tell that any number of tokens is multiplied from codes."""
        return True

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the linear: by codes for a few tokens, and for others by its unpacked weight if there is one.

        Args:
            activations: `[..., in]`.

        Returns:
            `[..., out]`, in the type of the activations.
        """
        are_few = activations.numel() <= CPU_MAX_LOOKUP_TOKENS * self.in_features
        # The short way is for small linears, whose product takes no longer than a few questions.
        if self.bias is None and are_few and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            return self.from_codes(activations)
        return self.from_packed(activations) if are_few else super().forward(activations)

    def from_codes(self, activations: Tensor) -> Tensor:
        """Multiply few tokens; see :class:`~nowag_pl.modules.compressed.coded.CodedLinear`."""
        scales = self.in_scale, self.out_scale
        return columns_matmul(activations, self.columns, self.table, self.codebook_shape, *scales)
