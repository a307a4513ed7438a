"""Packs videos into shards and loads them as training batches."""
