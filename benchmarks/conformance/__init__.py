"""Comparison with reference numbers of the published implementation."""
