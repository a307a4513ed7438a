"""Which patches a sample's encoders see: random masks from counters (paper section 3.3)."""

from typing import Literal, NamedTuple

import torch

from cavmae.kernels.philox import random_words

MaskMode = Literal["unstructured", "time", "freq", "tf"]


class MaskIds(NamedTuple):
    """Patch ids of a masked batch.

    Attributes:
        keep: (batch, kept) int64, in the order in which the encoder sees the patches.
        removed: (batch, removed) int64.
        restore: (batch, tokens) int64; place of each patch in `keep` followed by `removed`.
    """

    keep: torch.Tensor
    removed: torch.Tensor
    restore: torch.Tensor


def kept_count(tokens: int, ratio: float) -> int:
    """Patches kept of `tokens`, evaluated in floats as the published code does."""
    return int(tokens * (1 - ratio))


def mask_ids_from_shuffle(ids_shuffle: torch.Tensor, ratio: float) -> MaskIds:
    """Mask ids of a given shuffle.

    Args:
        ids_shuffle: (batch, tokens) a permutation of the patch ids per row; the first ones stay.
        ratio: share of patches removed.
    """
    ids_shuffle = ids_shuffle.long()
    kept = kept_count(ids_shuffle.shape[1], ratio)
    return MaskIds(
        keep=ids_shuffle[:, :kept],
        removed=ids_shuffle[:, kept:],
        restore=torch.argsort(ids_shuffle, dim=1),
    )


def _ranks(words: torch.Tensor) -> torch.Tensor:
    """(batch, n) the rank of each word in its row; equal words are ranked by their place."""
    place = torch.arange(words.shape[1], device=words.device)
    return torch.argsort(torch.argsort((words << 30) | place, dim=1), dim=1)


def random_mask(
    positions: torch.Tensor,
    *,
    seed: int,
    stream: str,
    grid: tuple[int, int],
    ratio: float,
    mode: MaskMode = "unstructured",
) -> MaskIds:
    """Random mask ids, a function of seed, stream and position alone.

    Structured modes mark `int(columns * ratio)` time columns or `int(rows * ratio)` frequency rows
    (`tf`: both, at 0.7 of the ratio) and remove marked patches first; the kept count is that of
    the unstructured mode, as in the published code.

    Args:
        positions: (batch,) int64 positions in the sample plan.
        seed: the run's seed.
        stream: `mask_audio` or `mask_video`.
        grid: patches as (rows of frequency or height, columns of time or width).
        ratio: share of patches removed, in [0, 1).
        mode: how patches are removed.

    Returns:
        `MaskIds` on the device of `positions`.
    """
    rows, columns = grid
    tokens = rows * columns
    patch = torch.arange(tokens, device=positions.device)
    marked = torch.zeros(len(positions), tokens, dtype=torch.bool, device=positions.device)
    share = ratio * 0.7 if mode == "tf" else ratio
    if mode in ("time", "tf"):
        words = random_words(positions, columns, seed=seed, stream=stream, part=1)
        marked |= (_ranks(words) < int(columns * share))[:, patch % columns]
    if mode in ("freq", "tf"):
        words = random_words(positions, rows, seed=seed, stream=stream, part=2)
        marked |= (_ranks(words) < int(rows * share))[:, patch // columns]
    words = random_words(positions, tokens, seed=seed, stream=stream)
    # Unique keys of 63 bits: marked patches last, then by random word, then by patch.
    keys = (marked.long() << 62) | (words << 30) | patch
    return mask_ids_from_shuffle(torch.argsort(keys, dim=1), ratio)
