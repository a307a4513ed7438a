"""A checkpoint that runs code when it is read by pickle alone."""

import os
from pathlib import Path

import torch


class _RunsCode:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def save_malicious(path: Path, folder: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the checkpoint, with `state` beside the code; returns the folder that only the code
    makes, in `folder`."""
    marker = folder / "code_ran"
    torch.save({**(state or {}), "extra": _RunsCode(marker)}, path)
    return marker
