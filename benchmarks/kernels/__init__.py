"""Kernels against torch and published methods."""
