"""How compressed weights are stored, and what that costs."""
