"""Tools for one machine: a check of what it has, and the demos."""
