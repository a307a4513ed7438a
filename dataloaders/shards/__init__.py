"""The shard format: reading and writing packed sets, local or remote, with a cache."""
