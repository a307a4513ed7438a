"""Runs first in each of Ray's processes."""

import logging
import os

import ray

_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def setup() -> None:
    """Keep Ray Train's cleaner quiet and on its own cluster.

    It asks the dashboard, which a cluster of our own has not, and says so every second; where the
    machine has a second Ray cluster, it does not know which one to ask.
    """
    logging.getLogger(_CLEANER).setLevel(logging.ERROR)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
