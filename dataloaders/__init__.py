"""The data plane: from videos to batches."""
