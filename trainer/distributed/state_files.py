"""Reading DeepSpeed's files as data: nothing that a file holds is run.

DeepSpeed and its converter read pickles, which call whatever they name. Here `torch.load` builds
tensors, plain containers and the few classes that a snapshot holds, and refuses all else before it
is called. Who may write to a checkpoint can still change its numbers.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cavmae.trainer.distributed.process_group import quiet_deepspeed

# isort: split
# After process_group.py, which sets the environment that DeepSpeed is imported in.
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
"""What the snapshots of all stages and dtypes hold besides what torch allows."""


def read_state_file(path: Any, map_location: Any = None, **_: Any) -> Any:
    """Read a file of a snapshot, with the signature of `torch.load`.

    Raises:
        ValueError: it names something else than data, which was not called.
    """
    try:
        with torch.serialization.safe_globals(_CLASSES):
            return torch.serialization.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"{path} holds {named[1] if named else 'something else than data'}, which is no part "
            "of a checkpoint and could run code, so the file was not loaded; take a checkpoint "
            "that only you could write to, or start from its weights.pt with --initial-weights"
        ) from error


@contextmanager
def state_read_as_data() -> Iterator[None]:
    """Have all that calls `torch.load` meanwhile read as `read_state_file` does."""
    before, torch.load = torch.load, read_state_file
    try:
        yield
    finally:
        torch.load = before


def main() -> None:
    """Run DeepSpeed's converter to its universal format, with the words of its command line."""
    with quiet_deepspeed(), state_read_as_data():
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main()
