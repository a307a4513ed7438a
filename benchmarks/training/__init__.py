"""Whole runs: the loop, memory, overhead, scaling, autotuning."""
