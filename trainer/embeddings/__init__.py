"""Embeddings of packed sets as Parquet files, search in them, and their places in a plane."""
