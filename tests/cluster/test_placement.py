"""Where the ranks of a run would be, and what `--dry-run` says of it."""

import itertools
from pathlib import Path

import pytest

from cavmae.cluster import placement, train
from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.placement import packed

SHALLOW_DEMO = ("demo", "--model.modality-depth=1", "--model.decoder-depth=1", "--dry-run")
"""Of which the memory is counted sooner."""


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("workers", [1, 5, 8, 12])
def test_every_rank_that_finds_room_is_on_one_node_side_by_side(workers: int) -> None:
    slots = [("small", 2), ("large", 4), ("none", 0), ("middle", 3)]
    found = packed(workers, slots, "")
    ranks = [rank for _, ranks in found.shares for rank in ranks]
    assert ranks == list(range(workers - found.waiting))
    assert found.waiting == max(0, workers - 9)
    room = dict(slots)
    assert all(len(ranks) <= room[node] for node, ranks in found.shares)


def test_no_fewer_nodes_would_hold_the_ranks() -> None:
    slots = [("a", 2), ("b", 4), ("c", 1), ("d", 3)]
    for workers in range(1, 11):
        needed = min(
            count
            for count in range(1, 5)
            for some in itertools.combinations(slots, count)
            if sum(room for _, room in some) >= workers
        )
        assert len(packed(workers, slots, "").shares) == needed


def test_gpus_that_no_cluster_is_asked_for_are_taken_to_be_on_equal_nodes() -> None:
    found = placement.placement(ClusterConfig(workers=12, gpus_per_worker=1, gpus_per_node=4))
    assert found.shares == [
        ("node 1", range(4)),
        ("node 2", range(4, 8)),
        ("node 3", range(8, 12)),
    ]
    assert found.rests_on.startswith("assumed") and not found.waiting


def test_cpu_ranks_without_an_address_are_all_here() -> None:
    found = placement.placement(ClusterConfig(workers=3))
    assert found.shares == [("this machine", range(3))]


def test_a_cluster_that_is_named_is_asked_for_its_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ClusterConfig(workers=8, gpus_per_worker=1, cpus_per_worker=6, address="head:6379")
    slots = [("10.0.0.1", 4), ("10.0.0.2", 2)]
    monkeypatch.setattr(placement, "_slots_of_cluster", lambda cluster: slots)
    found = placement.placement(asked)
    assert found.shares == [("10.0.0.1", range(4)), ("10.0.0.2", range(4, 6))]
    assert found.waiting == 2 and found.rests_on == "the nodes of head:6379"


def test_a_cluster_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: ClusterConfig) -> list[tuple[str, int]]:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr(placement, "_slots_of_cluster", refused)
    found = placement.placement(ClusterConfig(workers=2, gpus_per_worker=1, address="head:6379"))
    assert found.rests_on.endswith("head:6379 cannot be reached (no route)")
    assert found.shares == [("node 1", range(2))]


def test_the_command_says_where_and_how_fast_and_what_that_rests_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*SHALLOW_DEMO, "--workers", "16", "--gpus-per-worker", "1"]
    assert train.main(words) == 0
    shown = capsys.readouterr().out
    assert "nodes 2" in shown and "node 2: rank 8 to 15" in shown
    assert "predicted: " in shown and "what NVIDIA H200 is expected to reach" in shown
    with pytest.raises(ValueError, match="gpu is 'H900', whose speed is not known here; use one"):
        train.main([*words, "--gpu", "H900"])


def test_cpu_ranks_are_expected_to_be_as_fast_as_their_cores(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def expected(cores: str) -> float:
        train.main([*SHALLOW_DEMO, "--cpus-per-worker", cores, "--engine.dtype", "fp32"])
        shown = capsys.readouterr().out
        assert "measured: demo on an AMD EPYC" in shown
        return float(shown.split("predicted: ")[1].split(" samples/s")[0].replace(",", ""))

    assert expected("4") == pytest.approx(4 * expected("1"), rel=0.05)
