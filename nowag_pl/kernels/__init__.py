"""Compiled loops and GPU kernels. They import nothing of nowag_pl but each other."""
