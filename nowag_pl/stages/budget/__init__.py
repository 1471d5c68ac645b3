"""A budget of bits, spread over the linears of a model."""
