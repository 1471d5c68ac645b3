"""Figures: numbers in, a matplotlib figure out. Nothing here knows a model, and no global state of pyplot is used."""
