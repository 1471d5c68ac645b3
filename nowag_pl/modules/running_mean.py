"""What running means over tokens share."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningMean(nn.Module):
    """A sum over tokens in float64, so that neither the order of the batches nor their number matters.

    Args:
        shape: shape of the sum.
    """

    total: Tensor
    num_tokens: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up over all ranks of the default process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.num_tokens)

    def compute(self) -> Tensor:
        """Return the mean, float32."""
        return (self.total / self.num_tokens).float()
