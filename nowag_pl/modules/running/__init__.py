"""Forms of compressed linears that run faster and cannot be trained."""
