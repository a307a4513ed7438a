"""Loaders: from the sample plan to batches on the training device."""
