"""Evaluation of trained runs: classification, retrieval, linear probe, reconstruction."""
