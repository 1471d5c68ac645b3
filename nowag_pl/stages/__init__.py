"""What is done over the blocks of a model, one after the other."""
