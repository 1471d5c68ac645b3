"""Products of two sets of activations: mean over tokens of a b^T."""

import torch
from torch import Tensor

from nowag_pl.modules.running_mean import RunningMean


class CrossMoment(RunningMean):
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

    def __init__(self, num_rows: int, num_columns: int) -> None:
        super().__init__(num_rows, num_columns)

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
