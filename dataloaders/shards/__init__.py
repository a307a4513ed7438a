"""Packed sets: their format, remote storage and local cache."""
