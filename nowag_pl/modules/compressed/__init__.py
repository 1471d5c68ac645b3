"""Linears whose weight is kept in a compressed form."""
