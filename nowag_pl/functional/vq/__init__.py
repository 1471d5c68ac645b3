"""Vector quantization: k-means, codes, fits, products."""
