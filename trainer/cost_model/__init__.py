"""FLOPs, memory, communication and time of a step, computed before a run."""
