"""Training, packing and embedding on Ray clusters: placement, restarts, jobs, cluster files."""
