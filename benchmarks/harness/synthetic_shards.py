"""Packed shards of generated clips, for benchmarks that are given no data."""

from pathlib import Path

from rich.console import Console

from cavmae.dataloaders.packing.pack import PackConfig, pack
from cavmae.dataloaders.tools.synthetic import generate


def synthetic_shards(
    work: Path,
    clips: int,
    *,
    seed: int = 0,
    size: int = 64,
    fps: float = 8,
    seconds: float = 2.0,
    tier: str = "frames",
) -> Path:
    """Generate clips and pack them.

    Args:
        work: folder for `videos` and `shards`.
        clips: how many.
        seed, size, fps, seconds: as `generate` takes them.
        tier: to pack.

    Returns:
        Folder of the packed tier.
    """
    listing = generate(work / "videos", clips, seed, size=size, fps=fps, seconds=seconds)
    pack(PackConfig(str(listing), str(work / "shards"), tiers=tier), Console(quiet=True))
    return work / "shards" / tier
