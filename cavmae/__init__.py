"""Contrastive audio-visual masked autoencoder pretraining, from raw video to a trained model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cavmae.trainer.inference.load import load

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import `load` when it is used: it needs torch, and most commands begin without."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("cavmae.trainer.inference.load").load
