"""Ray nodes on loopback, for a test that gives orders: a line in, a line with `=` out.

add        another node with one core; answers with its number
cut N      node N is gone at once
strike N   a rank on node N is killed, once there is one
drain N S  node N is taken away in S seconds: the notice a cloud gives for a spot machine
"""

import logging
import sys
import time
from typing import Any

import psutil
import ray
from ray._private.state import state
from ray.cluster_utils import Cluster

PREEMPTION = 2


def main() -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 100_000_000,
        },
    )
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    nodes = []
    print("=", cluster.address, flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "add":
            name = f"node-{len(nodes)}"
            options: Any = {"num_cpus": 1, "object_store_memory": 100_000_000, "node_name": name}
            nodes.append(cluster.add_node(**options))
        node = nodes[int(numbers[0])] if numbers else nodes[-1]
        if word == "cut":
            cluster.remove_node(node, allow_graceful=False)
        if word == "strike":
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            while not (
                ranks := [one for one in raylet.children() if "RayTrainWorker" in one.name()]
            ):
                time.sleep(0.1)
            ranks[0].kill()
        if word == "drain":
            deadline = int((time.time() + float(numbers[1])) * 1000)
            gcs: Any = ray._raylet.GcsClient(address=cluster.address)  # pyright: ignore
            accepted, why = gcs.drain_node(node.node_id, PREEMPTION, "spot notice", deadline)
            assert accepted, why
            assert state.get_draining_nodes()
        print("=", len(nodes) - 1, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
