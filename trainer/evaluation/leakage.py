"""Leakage: whether a model is scored on clips that it was trained on.

Two clips are the same if their sound and frames are, whatever their names, tiers, codecs and sizes;
of sets of one modality, if that is, and they can only be compared with sets of the same. Packed
sets and runs have a hash of each clip's content, so no shard is read.
"""

from collections.abc import Sequence

import numpy as np

from cavmae.dataloaders.packing.duplicates import LISTED, LeakageError
from cavmae.dataloaders.shards.format import CONTENT_FILE
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.evaluation.trained_run import OTHER_SET, AnyRun, train_sets_now
from cavmae.trainer.trained_on import TrainedOn


def check_leakage(run: AnyRun, shards: ShardSet, others: Sequence[str] = (), *, allow: bool) -> str:
    """Refuse a set that shares clips with those that a run, or a classifier, was trained on.

    Args:
        run: to be scored.
        shards: the tier that it is scored on.
        others: tiers that were trained on besides the run's.
        allow: don't check.

    Returns:
        The result's `leakage`.

    Raises:
        LeakageError: names some of the shared clips, and what to do.
        OSError, ValueError: a set can't be read, or its content is unknown.
    """
    if allow:
        return "not checked"
    training = run.training.joined(TrainedOn.of_sets(others, run.config.data.cache))
    found = trained_on_clips(shards, training)
    if found:
        moved = [place for place, state in train_sets_now(run).items() if state == OTHER_SET]
        note = f" (the set at data.train, {', '.join(moved)}, is {OTHER_SET})" if moved else ""
        raise LeakageError(
            f"{len(found)} clips of {shards.folder} were trained on, by their sound and frames, "
            f"such as {', '.join(_source(shards, one) for one in found[:LISTED])}{note}; give a "
            "set without them, or pass --allow-leakage, which the result records"
        )
    return training.leakage(shards.modality)


def trained_on_clips(shards: ShardSet, training: TrainedOn) -> list[int]:
    """Find the clips of a packed tier that were trained on; returns their positions.

    Raises:
        OSError, ValueError: the content hashes can't be read, or there are none.
    """
    if shards.fingerprint in {one.fingerprint for one in training.sets}:
        return list(range(shards.samples))
    content = shards.content()
    if content is None:
        raise ValueError(
            f"{shards.folder} has no {CONTENT_FILE}, so it is unknown whether its clips were "
            "trained on; copy the whole tier again, or pass --allow-leakage, which the result "
            "records"
        )
    return np.flatnonzero(np.isin(content, training.content)).tolist()


def _source(shards: ShardSet, position: int) -> str:
    return shards.description(*shards.at(position))["source"]["path"]
