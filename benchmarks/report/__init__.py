"""Comparing records, and a report of the newest ones."""
