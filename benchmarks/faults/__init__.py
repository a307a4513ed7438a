"""Faults injected into real runs, and long soaks."""
