"""Retrieval and classification metrics."""
