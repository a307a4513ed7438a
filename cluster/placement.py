"""On which nodes the ranks of a run would be: as few as hold them, ranks of one side by side.

That is what Ray's strategy PACK aims at, which `cavmae train` asks for.
"""

from dataclasses import dataclass

import torch

from cavmae.cluster.config import ClusterConfig
from cavmae.cluster.connection import address_of, connected


@dataclass(frozen=True)
class Share:
    """Attributes: node, its name; first, last, the ranks there."""

    node: str
    first: int
    last: int


@dataclass(frozen=True)
class Placement:
    """Attributes: shares, by rank; waiting, ranks that find no place; rests_on, where that comes
    from."""

    shares: tuple[Share, ...]
    waiting: int
    rests_on: str

    @property
    def most_on_a_node(self) -> int:
        """Ranks of the fullest node; 1 where none is placed."""
        return max((share.last - share.first + 1 for share in self.shares), default=1)


def placement(cluster: ClusterConfig) -> Placement:
    """Of the ranks of a run that nothing else runs beside.

    A cluster that is named and cannot be reached is said, and its nodes are taken to be alike.
    """
    unreachable = ""
    if address_of(cluster):
        try:
            slots = _slots_of_cluster(cluster)
        except (ConnectionError, TimeoutError) as error:
            reason = str(error).splitlines()[0]
            unreachable = f"; {address_of(cluster)} cannot be reached ({reason})"
        else:
            return packed(cluster.workers, slots, f"the nodes of {address_of(cluster)}")
    elif not cluster.gpus_per_worker or torch.cuda.device_count() >= cluster.workers:
        alone = [("this machine", cluster.workers)]
        return packed(cluster.workers, alone, "no address: Ray is started here")
    each = cluster.gpus_per_node if cluster.gpus_per_worker else cluster.workers
    alike = [(f"node {number + 1}", each) for number in range(-(-cluster.workers // each))]
    return packed(
        cluster.workers, alike, f"assumed nodes of {each} ranks (gpus_per_node){unreachable}"
    )


def packed(workers: int, slots: list[tuple[str, int]], rests_on: str) -> Placement:
    """Ranks on nodes, those with most room first.

    Args:
        workers: ranks.
        slots: name of each node, and ranks that it holds.
        rests_on: where `slots` come from.
    """
    shares, placed = [], 0
    for node, room in sorted(slots, key=lambda slot: -slot[1]):
        count = min(room, workers - placed)
        if count > 0:
            shares.append(Share(node, placed, placed + count - 1))
            placed += count
    return Placement(tuple(shares), workers - placed, rests_on)


def _slots_of_cluster(cluster: ClusterConfig) -> list[tuple[str, int]]:
    """Ranks that each living node of the cluster could hold if it were empty."""
    import ray

    needed = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    with connected(cluster, threads=1):
        nodes = [node for node in ray.nodes() if node["Alive"]]
    return [
        (
            node["NodeManagerAddress"],
            min(
                int(node["Resources"].get(kind, 0) // each) for kind, each in needed.items() if each
            ),
        )
        for node in nodes
    ]
