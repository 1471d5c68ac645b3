"""Trellis quantization (QTIP, arXiv:2406.11235): codes, paths, tiles, rotation, and the whole method for one weight."""
