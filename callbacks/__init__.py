"""When the stages happen."""
