"""Contrastive audio-visual masked autoencoder pretraining, from raw video to a trained model."""

__version__ = "0.2.0"
