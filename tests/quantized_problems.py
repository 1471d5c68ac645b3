"""Weights, correlated second moments, and the codes of k-means."""

import torch

from nowag_pl.functional.moments import output_error
from nowag_pl.functional.normalization import normalize
from nowag_pl.functional.vq.kmeans import KMeansSettings, weighted_kmeans
from nowag_pl.functional.vq.quantized import Quantized, subvectors


def problem(out_features=4, in_features=6, dim=2, num_codewords=3, seed=0, num_tokens=40):
    """Return a weight, correlated second moments, and what k-means makes of the weight."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator)
    tokens = torch.randn(num_tokens, in_features, generator=generator) @ mixing
    weight = torch.randn(out_features, in_features, generator=generator)
    normalized = normalize(weight)
    points = subvectors(normalized.weight, dim)
    fit = weighted_kmeans(points, torch.ones_like(points), KMeansSettings(num_codewords, max_iters=5), generator)
    codes = fit.codes.view(out_features, -1)
    quantized = Quantized(fit.codebook, codes, normalized.in_scale, normalized.out_scale)
    return weight, tokens.T @ tokens / num_tokens, quantized


def total(weight, quantized, matrix):
    return float(output_error(weight, quantized.weight, matrix).sum())
