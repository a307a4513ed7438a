"""What keeps a run alive: preemption, hangs, stragglers, out of memory."""
