"""The CAV-MAE model; it knows nothing of ranks and imports only torch and our kernels."""
