"""What all benchmarks share: records, hardware, processes, timing."""
