"""The control plane of many ranks: every part is timed, and does what it does in a run."""

from pathlib import Path

from cavmae.benchmarks.training.control_plane import ControlPlaneConfig, measure


def test_every_part_is_timed(packed_synthetic: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").symlink_to(packed_synthetic)
    config = ControlPlaneConfig(ranks=20, processes=1, clips=5, micro_batches=2)
    results = measure(config, tmp_path)
    assert results["suspects"]["clips"] == 20 * 5, "the last micro-batch of each rank"
    assert list((tmp_path / "node-0").iterdir()) == []
    assert len(list((tmp_path / "run/checkpoints").rglob("*states.pt"))) == 20
    assert all(part.get("median_seconds", part.get("seconds")) > 0 for part in results.values())
