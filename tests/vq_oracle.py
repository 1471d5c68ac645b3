"""Vector-quantized problems of any shape, and their products in float64."""

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from nowag_pl.functional.storage.packing import pack
from nowag_pl.kernels.bits import code_bits


class Problem(NamedTuple):
    tokens: Tensor
    codes: Tensor  # packed
    codebook: Tensor
    in_scale: Tensor
    out_scale: Tensor

    @property
    def expected(self) -> Tensor:
        return self.tokens.double() @ self.weight.T

    @property
    def weight(self) -> Tensor:
        """Codewords row after row, cut at the end of a row, times both scales; codes read bit by bit."""
        out_features, in_features = len(self.out_scale), len(self.in_scale)
        dim, bits = self.codebook.shape[1], code_bits(len(self.codebook))
        digits = (self.codes.cpu().long()[:, None] >> torch.arange(8)).flatten() & 1
        count = out_features * ceil(in_features / dim)
        codes = (digits[: count * bits].view(count, bits) << torch.arange(bits)).sum(dim=1)
        rows = self.codebook.double().cpu()[codes].reshape(out_features, -1)[:, :in_features]
        return (self.out_scale.double().cpu()[:, None] * rows * self.in_scale.double().cpu()).to(self.tokens.device)

    def error(self, output: Tensor) -> float:
        """Relative error of a product."""
        expected = self.expected
        assert output.dtype == self.tokens.dtype
        return float((output.double() - expected).norm() / expected.norm())


def problem(rows, columns, dim, size, num_tokens, dtype=torch.float32, device="cpu", seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(size, (rows * ceil(columns / dim),), generator=generator)
    codes[-1] = size - 1
    return Problem(
        torch.randn(num_tokens, columns, generator=generator).to(dtype).to(device),
        pack(codes, code_bits(size)).to(device),
        torch.randn(size, dim, generator=generator).half().float().to(device),
        (torch.rand(columns, generator=generator) + 0.5).half().float().to(device),
        (torch.rand(rows, generator=generator) + 0.5).half().float().to(device),
    )
