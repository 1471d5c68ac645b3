"""Products of two sets of activations: mean over tokens of a b^T."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class CrossMoment(nn.Module):
    """Running mean of the products of all pairs of features of two activations, over tokens.

    Sums are float64; products are made in float32, a sequence at a time, as those of
    :class:`~nowag_pl.modules.second_moment.SecondMoment`.

    Args:
        num_rows: length of the last dimension of the first activations.
        num_columns: that of the second ones.

    Example:
        >>> import torch
        >>> moment = CrossMoment(1, 2)
        >>> moment.update(torch.tensor([[[2.0]]]), torch.tensor([[[1.0, 3.0]]]))
        >>> moment.compute().tolist()
        [[2.0, 6.0]]
    """

    total: Tensor
    num_tokens: Tensor

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(num_rows, num_columns, dtype=torch.float64))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, rows: Tensor, columns: Tensor) -> None:
        """Add tokens.

        Args:
            rows: a, `[..., seq_len, num_rows]`, any floating type.
            columns: b, `[..., seq_len, num_columns]`, the same tokens.
        """
        sequences = (part.reshape(-1, *part.shape[-2:]) for part in (rows, columns))
        for left, right in zip(*sequences, strict=True):  # [seq_len, features]
            self.total += left.float().T @ right.float()
        self.num_tokens += columns[..., 0].numel()

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up over all ranks of the default process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.total)
            dist.all_reduce(self.num_tokens)

    def compute(self) -> Tensor:
        """Return the mean products `[num_rows, num_columns]`, float32."""
        return (self.total / self.num_tokens).float()
