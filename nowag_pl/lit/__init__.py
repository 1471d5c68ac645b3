"""Lightning lives here: the module, the data, the metrics, the trainer."""
