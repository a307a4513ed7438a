"""Every field of a run, its recipes, and how they are parsed, resolved and saved, without torch."""
