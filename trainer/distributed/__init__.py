"""Ranks: joining and leaving, collectives, and DeepSpeed."""
