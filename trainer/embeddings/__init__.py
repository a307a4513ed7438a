"""Embeddings of packed sets as Parquet files, and search in them."""
