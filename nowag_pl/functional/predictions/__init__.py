"""What models say of the next token, compared."""
