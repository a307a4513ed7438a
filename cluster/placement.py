"""Predicted placement of ranks on nodes: as few nodes as possible, consecutive ranks together.

That is what Ray's placement strategy PACK aims at, which `cavmae train` uses.
"""

from dataclasses import dataclass

import torch

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import address_of, connected, node_slots


@dataclass(frozen=True)
class Placement:
    """Attributes: shares, name and ranks of each node; waiting, number of ranks without a node;
    rests_on, the source of the node list."""

    shares: list[tuple[str, range]]
    waiting: int
    rests_on: str

    @property
    def most_on_a_node(self) -> int:
        """Number of ranks on the fullest node; 1 where none is placed."""
        return max((len(ranks) for _, ranks in self.shares), default=1)


def placement(cluster: ClusterConfig, *, ask_cluster: bool = True) -> Placement:
    """Place the ranks of a run on an otherwise idle cluster.

    Where the named cluster cannot be reached, `rests_on` says so and equal nodes are assumed; they
    also are where it is not asked.

    Raises:
        ValueError: the address is not one of a cluster.
    """
    unreachable = ""
    if ask_cluster and address_of(cluster):
        try:
            slots = _slots_of_cluster(cluster)
        except (ConnectionError, TimeoutError) as error:
            reason = str(error).splitlines()[0]
            unreachable = f"; {address_of(cluster)} cannot be reached ({reason})"
        else:
            return packed(cluster.workers, slots, f"the nodes of {address_of(cluster)}")
    elif ask_cluster and cluster.gpus_per_worker * cluster.workers <= torch.cuda.device_count():
        alone = [("this machine", cluster.workers)]
        return packed(cluster.workers, alone, "no address: Ray is started here")
    each = cluster.gpus_per_node if cluster.gpus_per_worker else cluster.workers
    alike = [(f"node {number + 1}", each) for number in range(-(-cluster.workers // each))]
    return packed(
        cluster.workers, alike, f"assumed nodes of {each} ranks (gpus_per_node){unreachable}"
    )


def packed(workers: int, slots: list[tuple[str, int]], rests_on: str) -> Placement:
    """Fill the nodes with ranks, the roomiest first.

    Args:
        workers: number of ranks.
        slots: name and capacity in ranks of each node.
        rests_on: source of `slots`.
    """
    shares, placed = [], 0
    for node, room in sorted(slots, key=lambda slot: -slot[1]):
        count = min(room, workers - placed)
        if count > 0:
            shares.append((node, range(placed, placed + count)))
            placed += count
    return Placement(shares, workers - placed, rests_on)


def _slots_of_cluster(cluster: ClusterConfig) -> list[tuple[str, int]]:
    """Return `node_slots` of the cluster that the configuration names."""
    with connected(cluster, threads=1):
        return node_slots(cluster)
