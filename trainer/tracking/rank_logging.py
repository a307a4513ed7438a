"""What a rank says: on standard error for the one who watches, in a file for the one who looks."""

import logging
import sys
from pathlib import Path


def log_to_stderr(rank: int) -> None:
    """Everything from rank 0, warnings from the others."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("cavmae").setLevel(logging.INFO)  # for the file
    for handler in logging.getLogger().handlers:  # Ray has its own
        handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)


def log_to_file(path: Path) -> None:
    """Everything, for whoever looks for what a rank said; starts follow each other in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("cavmae")
    for former in [one for one in logger.handlers if isinstance(one, logging.FileHandler)]:
        logger.removeHandler(former)
        former.close()
    logger.addHandler(handler)
