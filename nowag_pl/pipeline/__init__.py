"""The stages over blocks: calibrate, compress, compare; artefacts, manifest, resume. Knows ranks, not the Trainer."""
