"""ARMOR (arXiv:2510.05528)."""
