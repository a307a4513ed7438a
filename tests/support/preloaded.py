"""All that a rank of a test imports, imported; see `forks.py`."""

import importlib
import os

_before = dict(os.environ)
for name in (
    "torch._inductor.compile_fx",
    "cavmae.trainer.trainer",
    "cavmae.trainer.fault_tolerance.oom",
    "matplotlib.figure",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
):
    importlib.import_module(name)

SET = {name: value for name, value in os.environ.items() if _before.get(name) != value}
"""Variables that these modules set when they are imported, which a rank has too."""
