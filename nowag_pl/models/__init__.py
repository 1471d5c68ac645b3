"""The only place that knows transformers: find, load, stream and save models."""
