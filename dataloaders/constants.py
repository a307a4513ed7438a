"""Constants that packing, loading and evaluation share. Imports nothing heavy."""

from typing import Literal

AUDIO_HZ = 16000
WINDOW_SAMPLES = 400
"""Length of a window of the log-mel."""
HOP_SAMPLES = 160
"""Distance between the starts of two windows."""
FRAMES_PER_CLIP = 10
"""Frames that packing chooses of each clip (`ten_frames` in a sample's JSON)."""
MIDDLE_FRAME = FRAMES_PER_CLIP // 2
"""The one of the ten frames that is used where nothing is drawn."""

AUDIO_CODECS = ("flac", "wav")
TIERS = ("frames", "video", "original", "audio")

Modalities = Literal["both", "audio", "video"]
"""What a set has, or a run reads: sound and pictures, or one of them alone."""

IMAGE_MEAN = (0.4850, 0.4560, 0.4060)
"""ImageNet's mean of R, G and B, for values from 0 to 1."""
IMAGE_STD = (0.2290, 0.2240, 0.2250)
"""ImageNet's standard deviation of R, G and B, for values from 0 to 1."""
