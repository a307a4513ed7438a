"""Many runs: queues of experiments and sweeps."""
