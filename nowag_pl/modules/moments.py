"""Means over tokens: of x_j^2 or x x^T (second moments), and of products a b^T of two activations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nowag_pl.functional.moments import mean_squares
from nowag_pl.functional.ranges import check_whole


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
        return self._mean()

    def _mean(self) -> Tensor:
        return (self.total / self.num_tokens).float()


class SecondMoment(RunningMean):
    """Running mean of the squares of each input feature, or of the products of all pairs, over tokens.

    Sums are float64, so that neither the order of the batches nor their number matters. Products of pairs are computed
    in float32, a sequence at a time.

    Args:
        num_features: length of the last dimension of the observations.
        full: gather the matrix of x_i x_j, whose diagonal are the squares.

    Example:
        >>> import torch
        >>> moment = SecondMoment(2)
        >>> moment.update(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        >>> moment.compute().tolist()
        [5.0, 2.0]
    """

    def __init__(self, num_features: int, full: bool = False) -> None:
        check_whole("num_features", num_features, 1)
        super().__init__(*(num_features, num_features) if full else (num_features,))

    @torch.no_grad()
    def update(self, activations: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            activations: `[..., num_features]`, any floating type.
            weights: weight of each token, `[...]`; None: 1.

        Raises:
            ValueError: the last dimension is not `num_features`.
        """
        if not isinstance(activations, Tensor) or activations.dim() == 0:
            raise ValueError(f"Expected activations as a tensor with features, but got {type(activations).__name__}.")
        if activations.shape[-1] != len(self.total):
            raise ValueError(f"Expected activations of {len(self.total)} features, but got {activations.shape[-1]}.")
        if weights is not None and weights.numel() != activations[..., 0].numel():
            raise ValueError(
                f"Expected a weight for each of {activations[..., 0].numel()} tokens, but got {weights.numel()}."
            )
        if self.total.dim() == 1:
            squares = activations.reshape(-1, len(self.total)).float().square()  # [tokens, features]
            if weights is not None:
                squares = squares * weights.reshape(-1, 1)
            self.total += squares.sum(dim=0, dtype=torch.float64)
        else:
            for number, sequence in enumerate(activations.reshape(-1, *activations.shape[-2:])):  # [seq_len, features]
                with bfloat16_products(sequence):
                    self.total += weighted(sequence.float(), weights, number).T @ sequence.float()
        self.num_tokens += activations[..., 0].numel()

    @torch.no_grad()
    def merge(self, other: "SecondMoment") -> None:
        """Add the tokens that another one has seen.

        Raises:
            ValueError: the other one has another number of features, or only one of both is full.
        """
        if other.total.shape != self.total.shape:
            raise ValueError(
                f"Expected second moments of shape {tuple(self.total.shape)}, but got {tuple(other.total.shape)}."
            )
        self.total += other.total
        self.num_tokens += other.num_tokens

    def compute(self) -> Tensor:
        """Return the mean squares `[num_features]`, or products `[num_features, num_features]`, float32.

        Raises:
            RuntimeError: nothing was observed.
            ValueError: NaN or infinity was observed.
        """
        if self.num_tokens == 0:
            raise RuntimeError("Expected at least one update before compute, but got none.")
        mean = self._mean()
        # No product of two is larger than both squares.
        finite = mean_squares(mean).isfinite()
        if not finite.all():
            raise ValueError(
                f"Expected finite activations, but got NaN or infinity in {int((~finite).sum())} of "
                f"{len(mean)} input features."
            )
        return mean


class WeightedMoment(SecondMoment):
    """A mean of squares or products in which each token counts by its weight; the weights need not be 1 on average.

    Args:
        num_features: as for :class:`SecondMoment`.
        full: as for :class:`SecondMoment`.

    Example:
        >>> import torch
        >>> moment = WeightedMoment(1)
        >>> moment.update(torch.tensor([[1.0], [2.0]]), torch.tensor([0.75, 0.25]))
        >>> moment.update(torch.tensor([[4.0]]), torch.tensor([1.0]))
        >>> moment.compute().tolist()  # (0.75 + 1 + 16) / 2
        [8.875]
    """

    total_weight: Tensor

    def __init__(self, num_features: int, full: bool = False) -> None:
        super().__init__(num_features, full)
        self.register_buffer("total_weight", torch.zeros((), dtype=torch.float64))

    @property
    def has_weight(self) -> bool:
        """Whether any token counted."""
        return bool(self.total_weight > 0)

    @torch.no_grad()
    def update(self, activations: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens, as :meth:`SecondMoment.update` does."""
        counted = None if weights is None else weights.float()
        super().update(activations, counted)
        self.total_weight += activations[..., 0].numel() if counted is None else counted.sum(dtype=torch.float64)

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up over all ranks of the default process group, if there is one."""
        super().all_reduce()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.total_weight)

    @torch.no_grad()
    def merge(self, other: "SecondMoment") -> None:
        """Add the tokens that another one has seen; without weights, they count 1."""
        super().merge(other)
        self.total_weight += other.total_weight if isinstance(other, WeightedMoment) else other.num_tokens

    def _mean(self) -> Tensor:
        return (self.total / self.total_weight).float()


class CrossMoment(RunningMean):
    """Running mean of the products of all pairs of features of two activations, over tokens.

    Sums are float64; products are made in float32, a sequence at a time, as those of
    :class:`SecondMoment`.

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
    def update(self, rows: Tensor, columns: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            rows: a, `[..., seq_len, num_rows]`, any floating type.
            columns: b, `[..., seq_len, num_columns]`, the same tokens.
            weights: weight of each token, `[..., seq_len]`; None: 1.
        """
        sequences = (part.reshape(-1, *part.shape[-2:]) for part in (rows, columns))
        for number, (left, right) in enumerate(zip(*sequences, strict=True)):  # [seq_len, features]
            with bfloat16_products(right):
                self.total += weighted(left.float(), weights, number).T @ right.float()
        self.num_tokens += columns[..., 0].numel()


class GradientMoment(RunningMean):
    """Running mean over sequences of `G G^T / in`, G the gradient of a sequence's loss in a linear's weight.

    The output side of the Kronecker factors of the final loss's curvature in the weight (YAQA, arXiv:2505.22988). The
    number of tokens of the mean is one for each sequence.

    Args:
        num_outputs: outputs of the linear.

    Example:
        >>> import torch
        >>> moment = GradientMoment(1)
        >>> moment.update(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.tensor([[[2.0], [1.0]]]))
        >>> moment.compute().tolist()  # G = [2, 5]
        [[14.5]]
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs, num_outputs)

    @torch.no_grad()
    def update(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add sequences.

        Args:
            inputs: of the linear, `[batch, seq_len, in]`.
            gradients: of each sequence's loss in the outputs, `[batch, seq_len, out]`.
        """
        for entering, gradient in zip(inputs, gradients, strict=True):
            with bfloat16_products(entering):
                of_weight = gradient.float().T @ entering.float()  # [out, in]
            self.total += of_weight @ of_weight.T / of_weight.shape[1]
        self.num_tokens += len(inputs)


@contextmanager
def bfloat16_products(activations: Tensor) -> Iterator[None]:
    """Let a CPU multiply float32 matrices in its bfloat16 units while the context is open, if it has them.

    Products of two bfloat16 numbers are exact in these units, and sums are float32 as elsewhere; weights of tokens and
    differences of activations are rounded to the precision that the activations have themselves.

    Args:
        activations: what is multiplied; the context makes no difference unless they are bfloat16, on a CPU.
    """
    if activations.dtype != torch.bfloat16 or activations.device.type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def weighted(sequence: Tensor, weights: Tensor | None, number: int) -> Tensor:
    """Return the tokens of a sequence `[seq_len, features]` times their weights.

    Args:
        sequence: activations of the tokens, float32.
        weights: weights of the tokens of several sequences, `[..., seq_len]`; None for weights of 1.
        number: number of the sequence among them.
    """
    return sequence if weights is None else sequence * weights.reshape(-1, len(sequence))[number][:, None]
