"""The folder of a compressed model."""
