"""One run directory: its files, manifest and processes."""
