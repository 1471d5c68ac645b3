"""The ground floor: tensors in, tensors out."""
