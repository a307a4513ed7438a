"""One machine: the demos, and `cavmae doctor`."""
