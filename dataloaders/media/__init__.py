"""Decoding and encoding of audio and video, and the log-mel."""
