"""`cavmae bench`: every claim of speed, memory and reliability is measured here."""
