"""Commands that verify and inspect packed sets, and synthetic videos."""
