"""Leakage: whether a model is scored on clips that it was trained on.

Two sets share a clip if both have it by name, or the same sound and frames under another name. The
reports of packing have both, so no shard is read.
"""

from collections.abc import Sequence
from pathlib import Path

from cavmae.dataloaders.packing.duplicates import LISTED, LeakageError, OtherSets, source_id
from cavmae.dataloaders.packing.output_folder import finished_reports
from cavmae.trainer.evaluation.trained_run import AnyRun, trained_on


def check_leakage(run: AnyRun, shards: str, others: Sequence[str] = (), *, allow: bool) -> str:
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
        ValueError: a set has no reports of packing, so it can't be known.
    """
    if allow:
        return "not checked"
    training = trained_on(run.config)
    check_not_trained_on(shards, [*training.tiers, *others])
    return training.leakage


def check_not_trained_on(shards: str, training_tiers: Sequence[str]) -> None:
    """Refuse a set that shares clips with those of the training.

    Args:
        shards: a packed tier, in the folder that packing made.
        training_tiers: what was trained on.

    Raises:
        LeakageError: names some of the shared clips, and what to do.
        ValueError: a set has no reports of packing, so it can't be known.
    """
    packed = [Path(tier).parent for tier in (shards, *training_tiers)]
    for tier, folder in zip((shards, *training_tiers), packed, strict=True):
        if next(finished_reports(folder), None) is None:
            raise ValueError(
                f"{tier}: packing's reports of its clips ({folder / 'finished'}) are missing, so "
                "clips that are in both sets can't be found; bring the folder that packing wrote, "
                "or pass --allow-leakage, which the result records"
            )
    known = OtherSets(map(str, packed[1:]))
    found = []
    for report in finished_reports(packed[0]):
        for clip in report["packed"]:
            name, content = source_id(clip["source"]), clip["content"]
            place = known.content.get(content) or known.names.get(name)
            if place is not None:
                found.append(f"{clip['source']} ({place})")
    if found:
        raise LeakageError(
            f"{len(found)} clips of {shards} were trained on, by name or by content, such as "
            f"{'; '.join(found[:LISTED])}; give a set without them, or pass --allow-leakage, which "
            "the result records"
        )
