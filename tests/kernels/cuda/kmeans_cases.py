"""Points, weights and codebooks for the search on CUDA; as a script, their search in Triton's interpreter as JSON."""

import json
import sys

import torch

from nowag_pl.kernels.cuda.kmeans import find_by_tensor_cores, find_nearest


def problem(num_points, dim, num_codewords, seed=0, device="cpu"):
    """Return features and codeword features: some codewords twice, some points at codewords, some without weight."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, dim, generator=generator)
    weights = torch.exp(2 * torch.randn(num_points, dim, generator=generator))
    weights[::7] = 0
    codebook = torch.randn(num_codewords, dim, generator=generator)
    codebook[num_codewords // 2] = codebook[0]
    points[1::5] = codebook[torch.arange(len(points[1::5])) % num_codewords]
    features = torch.cat([weights, weights * points], dim=1)
    right = torch.cat([codebook.square(), -2 * codebook], dim=1).T
    return features.to(device), right.contiguous().to(device)


def search(function, features, right):
    """Return codes, distances, and what the function returns."""
    codes = torch.full((len(features),), -1, dtype=torch.int32, device=features.device)
    distances = torch.full((len(features),), torch.nan, device=features.device)
    return codes, distances, function(features, right, codes, distances)


if __name__ == "__main__":
    results = []
    for case in json.loads(sys.argv[1]):
        codes, distances, _ = search(find_nearest, *problem(*case))
        doubtful = search(find_by_tensor_cores, *problem(*case))[2]
        results.append([codes.tolist(), distances.tolist(), doubtful.tolist()])
    print(json.dumps(results))
