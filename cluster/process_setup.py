"""The setup hook that Ray runs first in each of its processes."""

import logging
import os

import ray

_CLEANER = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def setup() -> None:
    """Keep Ray Train's placement group cleaner quiet and on its own cluster.

    It asks the dashboard, which a cluster started by us lacks, and logs that every second; on a
    machine with a second Ray cluster it does not know which one to ask.
    """
    logging.getLogger(_CLEANER).setLevel(logging.ERROR)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
