"""Ray: placing ranks on nodes, restarting them, and jobs on a cluster."""
