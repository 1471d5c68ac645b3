"""Linears that are multiplied from their codes for few tokens."""

from abc import abstractmethod

import torch
from torch import Tensor

from nowag_pl.functional.vq.matmul import is_for_few_tokens
from nowag_pl.modules.compressed.base import CompressedLinear


class CodedLinear(CompressedLinear):
    """A quantized linear; unless it is unpacked, or gradients are asked for, its codes are multiplied by few tokens."""

    @abstractmethod
    def from_codes(self, activations: Tensor) -> Tensor:
        """Multiply activations `[..., in]` by the transposed weight, without reconstructing it and without the bias."""

    def is_for_codes(self, num_tokens: int, device: torch.device) -> bool:
        """Tell whether so many tokens on a device are multiplied from codes; others take the reconstructed weight."""
        return is_for_few_tokens(num_tokens, device)

    def from_packed(self, activations: Tensor) -> Tensor:
        """Apply a linear that is not unpacked, by its codes where tokens are few and no gradients are asked for.

        Args:
            activations: `[..., in]`.

        Returns:
            `[..., out]`, in the type of the activations.
        """
        num_tokens = activations.numel() // self.in_features
        if (
            self.gives_gradients(activations)
            or torch.compiler.is_compiling()
            or not self.is_for_codes(num_tokens, activations.device)
        ):
            return super().from_packed(activations)
        if torch.is_autocast_enabled(activations.device.type):
            activations = activations.to(torch.get_autocast_dtype(activations.device.type))
        output = self.from_codes(activations)
        return output if self.bias is None else output + self.bias.to(output.dtype)
