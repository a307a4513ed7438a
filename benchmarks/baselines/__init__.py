"""The published methods that benchmarks compare with."""
