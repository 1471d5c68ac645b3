"""A pruned linear that runs as a dense one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nowag_pl.functional.storage.packing import unpack_keep
from nowag_pl.modules.compressed.masked import MaskedLinear
from nowag_pl.modules.running.base import RunningLinear


class DenseLinear(RunningLinear):
    """A :class:`MaskedLinear` for inference that holds its dense weight and its mask, but no kept values beside them.

    Args:
        masked: the linear.
        dtype: type of the weight in memory.
    """

    mask: Tensor
    dense: Tensor

    def __init__(self, masked: MaskedLinear, dtype: torch.dtype) -> None:
        super().__init__(masked)
        self.pattern, self.dtype = masked.pattern, masked.dtype
        self.register_buffer("mask", masked.mask)
        self.register_buffer("dense", masked.dense_weight(dtype).detach(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in]` with zeros where weights were removed."""
        return self.dense

    def forward(self, activations: Tensor) -> Tensor:
        """Apply the dense weight.

        Args:
            activations: `[..., in]`.
        """
        return self._product(activations, self.dense)

    def stored_state(self) -> dict[str, Tensor]:
        """Return the kept values, row-major, `[num_kept]`."""
        keep = unpack_keep(self.mask, (self.out_features, self.in_features), self.pattern)
        return {"values": self.dense[keep].to(self.dtype)}

    @classmethod
    def empty(cls, settings: Mapping[str, Any]) -> "DenseLinear":
        """Return a module with the right shapes and zeros."""
        masked = MaskedLinear.empty(settings)
        return cls(masked, masked.dtype)
