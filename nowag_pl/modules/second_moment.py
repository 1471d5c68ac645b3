"""Second moments of activations: mean of x_j^2 over tokens."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class SecondMoment(nn.Module):
    """Running mean of the squares of each input feature, over tokens.

    Sums are float64, so that neither the order of the batches nor their number matters.

    Args:
        num_features: length of the last dimension of what is observed.

    Example:
        >>> import torch
        >>> moment = SecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moment.compute().tolist()
        [5.0, 2.0]
    """

    total: Tensor
    num_tokens: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_features, dtype=torch.float64))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, activations: Tensor) -> None:
        """Add tokens.

        Args:
            activations: `[..., num_features]`, any floating type.

        Raises:
            ValueError: the last dimension is not `num_features`.
        """
        if activations.shape[-1] != len(self.total):
            raise ValueError(f"Expected activations of {len(self.total)} features, but got {activations.shape[-1]}.")
        tokens = activations.reshape(-1, len(self.total))  # [tokens, features]
        self.total += tokens.float().square().sum(dim=0, dtype=torch.float64)
        self.num_tokens += len(tokens)

    @torch.no_grad()
    def merge(self, other: "SecondMoment") -> None:
        """Add the tokens that another one has seen.

        Raises:
            ValueError: the other one has another number of features.
        """
        if len(other.total) != len(self.total):
            raise ValueError(f"Expected second moments of {len(self.total)} features, but got {len(other.total)}.")
        self.total += other.total
        self.num_tokens += other.num_tokens

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up over all ranks of the default process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.num_tokens)

    def compute(self) -> Tensor:
        """Return the mean squares `[num_features]`, float32.

        Raises:
            RuntimeError: nothing was observed.
            ValueError: NaN or infinity was observed.
        """
        if self.num_tokens == 0:
            raise RuntimeError("Expected at least one update before compute, but got none.")
        mean = (self.total / self.num_tokens).float()
        if not mean.isfinite().all():
            raise ValueError(
                f"Expected finite activations, but got NaN or infinity in {int((~mean.isfinite()).sum())} of "
                f"{len(mean)} input features."
            )
        return mean
