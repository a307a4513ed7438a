"""A training step: time, memory, parts, ablations, roofline."""
