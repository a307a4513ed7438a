"""Checkpoints: their format, where they are stored, saving beside the steps, loading."""
