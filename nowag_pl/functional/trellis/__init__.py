"""Trellis quantization (QTIP, arXiv:2406.11235): codes, paths, tiles, rotation, and the whole of it for one weight."""
