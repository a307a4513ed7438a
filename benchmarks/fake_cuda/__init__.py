"""A CUDA device that computes nothing, in a process of its own: what runs there, without a GPU."""
