"""The data plane: loader, storage tiers, shuffle quality, storage faults."""
