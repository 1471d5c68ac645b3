"""Small views of compressed linears: a few linears of a few blocks, one block at a time."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.pruning import nowag_scores
from nowag_pl.functional.ranges import check_whole
from nowag_pl.functional.thumbnails import downsample, even_indices, log_scale, principal_axes, sample
from nowag_pl.models.selection import find_linears
from nowag_pl.modules import CompressedLinear, MaskedLinear, VQLinear
from nowag_pl.run.layout import MOMENTS
from nowag_pl.stages import compression
from nowag_pl.stages.compression_run import CompressionRun

_log = logging.getLogger(__name__)
_LATER_EXPERT = re.compile(r"\.experts\.[1-9]")
_MASK_CROP = 32  # rows and columns of a mask whose single weights are shown


@dataclass(frozen=True)
class Limits:
    """Limits of the views.

    Attributes:
        max_blocks: number of blocks, at even distances, including the first and the last.
        linears: ends of the names of linears to show. None: all.
        max_image_size: largest side of the image of a matrix, in pixels.
        num_samples: number of weights in a histogram, and of subvectors in a plot of codewords.
    """

    max_blocks: int = 3
    linears: tuple[str, ...] | None = None
    max_image_size: int = 96
    num_samples: int = 4000

    def __post_init__(self) -> None:
        for name in ("max_blocks", "max_image_size", "num_samples"):
            check_whole(f"inspection.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class Codewords:
    """Subvectors and codewords of one linear in the plane of the subvectors' largest variance.

    Attributes:
        points: some of the subvectors `[n, 2]`.
        codewords: `[k, 2]`.
        counts: number of all subvectors that each codeword stands for, `[k]`.
    """

    points: Tensor
    codewords: Tensor
    counts: Tensor


@dataclass(frozen=True)
class LinearView:
    """A small view of one linear.

    Attributes:
        block: number of its block.
        name: its name in the block.
        images: `log10` of means over cells `[rows, columns]`: "weight" |W|, "normalized" |W_bar|, "importance" h W^2,
            "normalized_importance" h W_bar^2, and "error" h (W_bar - W_bar_hat)^2.
        histograms: samples of W, W_bar, `log10` of h W_bar^2.
        kept: share of kept weights of each cell, if the linear was pruned.
        mask: corner of the mask, if it was pruned.
        codewords: if it was quantized.
    """

    block: int
    name: str
    images: dict[str, Tensor]
    histograms: dict[str, Tensor]
    kept: Tensor | None = None
    mask: Tensor | None = None
    codewords: Codewords | None = None


def inspected_blocks(num_blocks: int, max_blocks: int) -> list[int]:
    """Return at most `max_blocks` blocks at even distances, the first and the last among them."""
    if max_blocks == 1 or num_blocks == 1:
        return [0][:num_blocks]
    return [
        round(index * (num_blocks - 1) / (few - 1)) for few in [min(num_blocks, max_blocks)] for index in range(few)
    ]


def inspect_linears(run: CompressionRun, limits: Limits) -> Iterator[LinearView]:
    """Look at compressed linears, in the order of the blocks, on the CPU: a device has its memory for the stages.

    Args:
        run: a run whose linears are compressed. Its artefacts are read; no other process need take part.
        limits: limits of the views.
    """
    names = [name for index in range(len(run.model)) for name in run.model.linears(index)]
    if limits.linears is not None and not any(name.endswith(limits.linears) for name in names):
        _log.warning(
            "inspection.linears: no linear ends with any of %s; there are %s",
            list(limits.linears),
            ", ".join(dict.fromkeys(names)),
        )
    for index in inspected_blocks(len(run.model), limits.max_blocks):
        dense = find_linears(run.model.load_block(index))
        moments, _ = run.store.read(MOMENTS, index)
        for name, compressed in compression.read_block(run.store, index).items():
            # Of experts, which may be hundreds, only the first.
            wanted = _LATER_EXPERT.search(name) is None if limits.linears is None else name.endswith(limits.linears)
            if wanted:
                yield inspect_linear(index, name, dense.pop(name).cpu(), compressed, moments[name], limits)


@torch.no_grad()
def inspect_linear(
    block: int, name: str, linear: nn.Linear, compressed: CompressedLinear, second_moment: Tensor, limits: Limits
) -> LinearView:
    """Look at one linear.

    Args:
        block: number of its block.
        name: its name in the block.
        linear: the dense linear `[out, in]`.
        compressed: the linear in its place.
        second_moment: `[in]`.
        limits: limits of the views.
    """
    weight = linear.weight.float()
    normalized = normalize(weight)
    scores = nowag_scores(normalized.weight, second_moment)
    reconstruction = compressed.weight.float() / normalized.in_scale / normalized.out_scale[:, None]
    size, count = limits.max_image_size, limits.num_samples
    images = {
        "weight": downsample(weight.abs(), size),  # each matrix is released before the next
        "normalized": downsample(normalized.weight.abs(), size),
        "importance": downsample(nowag_scores(weight, second_moment), size),
        "normalized_importance": downsample(scores, size),
        "error": downsample(nowag_scores(normalized.weight - reconstruction, second_moment), size),
    }
    histograms = {
        "weight": sample(weight, count),
        "normalized_weight": sample(normalized.weight, count),
        "log10_importance": log_scale(sample(scores, count)),
    }
    kept = mask = codewords = None
    if isinstance(compressed, MaskedLinear):
        keep = compressed.keep
        kept, mask = downsample(keep.float(), size), keep[:_MASK_CROP, :_MASK_CROP]
    elif isinstance(compressed, VQLinear) and compressed.subvector_dim > 1:
        codewords = _codewords(normalized.weight, compressed, count)
    shown = {key: log_scale(image) for key, image in images.items()}
    return LinearView(block, name, shown, histograms, kept, mask, codewords)


def _codewords(weight: Tensor, compressed: VQLinear, num_samples: int) -> Codewords:
    """Project some subvectors of the normalised weight `[out, in]`, and the codewords."""
    dim = compressed.subvector_dim
    padding = -weight.shape[1] % dim
    subvectors = F.pad(weight, (0, padding)).view(-1, dim)
    points = subvectors[even_indices(len(subvectors), num_samples).to(weight.device)]
    mean, axes = principal_axes(points)
    counts = torch.bincount(compressed.unpacked_codes.flatten().long(), minlength=compressed.codebook_size)
    return Codewords((points - mean) @ axes, (compressed.codebook - mean) @ axes, counts)
