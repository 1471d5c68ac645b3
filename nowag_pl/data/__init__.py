"""Text sources, tokenising, windows, cache."""
