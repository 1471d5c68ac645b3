"""Comparison of models' predictions of the next token."""
