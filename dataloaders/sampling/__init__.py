"""The order of samples: sample plans, mixtures, and counter-based random numbers."""
