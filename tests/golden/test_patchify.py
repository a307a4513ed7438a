"""The order of values in a patch and of patches in a grid."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cavmae.benchmarks.conformance.tolerances import Deviation, mismatches
from cavmae.kernels import gather_patches, masked_reconstruction_loss

pytestmark = pytest.mark.golden


def test_patches_are_cut_and_ordered_as_published(
    patchify_file: Path, check_deviations_of: Callable[[list[Deviation]], None]
) -> None:
    with np.load(patchify_file) as arrays:
        files = dict(arrays)
    deviations = []
    for kind in ("image", "audio"):
        pixels = torch.from_numpy(files[kind]).float()
        expected = torch.from_numpy(files[f"{kind}_patches"]).float()
        ids = torch.arange(expected.shape[1]).expand(len(pixels), -1)
        patches = gather_patches(pixels, ids).unflatten(2, (pixels.shape[1], 16, 16))
        patches = patches.permute(0, 1, 3, 4, 2).flatten(2)  # row, column, channel
        loss = masked_reconstruction_loss(expected, pixels, ids, norm_pix=False)
        deviations += [
            mismatches(f"{kind} patches", patches.numpy(), expected.numpy()),
            # The published patches are the targets of the loss: predicting them costs nothing.
            Deviation(f"{kind} reconstruction loss", float(loss), 0),
        ]
    check_deviations_of(deviations)
