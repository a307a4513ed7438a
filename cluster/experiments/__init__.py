"""Many runs on one cluster: a queue with priorities, and hyperparameter sweeps."""
