"""From videos to packed shards."""
