"""`cavmae pack`: from videos to shards."""
