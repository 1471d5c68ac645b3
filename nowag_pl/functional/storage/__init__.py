"""Storage of compressed weights, and its size."""
