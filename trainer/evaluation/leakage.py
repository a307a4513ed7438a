"""Whether a model is scored on clips that it was trained on.

Two sets share a clip where one has a name of the other, or the same sound and pictures under
another name. What packing noted of each clip answers it, without reading a shard.
"""

from collections.abc import Sequence
from pathlib import Path

from cavmae.dataloaders.packing.duplicates import LISTED, LeakageError, OtherSets, source_id
from cavmae.dataloaders.packing.output_folder import finished_reports


def check_not_trained_on(shards: str, trained_on: Sequence[str]) -> None:
    """Refuse a set that shares clips with those of the training.

    Args:
        shards: a packed tier, in the folder that packing made.
        trained_on: the tiers of the training.

    Raises:
        LeakageError: names some of the shared clips, and what to do.
        ValueError: what packing noted of a set is not there, so it can't be known.
    """
    packed = [Path(tier).parent for tier in (shards, *trained_on)]
    for tier, folder in zip((shards, *trained_on), packed, strict=True):
        if next(finished_reports(folder), None) is None:
            raise ValueError(
                f"{tier}: what packing noted of its clips ({folder / 'finished'}) is not there, so "
                "clips that are in both sets can't be found; bring the folder that packing made, "
                "or say --allow-leakage, which the result will tell"
            )
    training = OtherSets(map(str, packed[1:]))
    found = []
    for report in finished_reports(packed[0]):
        for clip in report["packed"]:
            name, content = source_id(clip["source"]), clip["content"]
            place = training.content.get(content) or training.names.get(name)
            if place is not None:
                found.append(f"{clip['source']} ({place})")
    if found:
        raise LeakageError(
            f"{len(found)} clips of {shards} were trained on, by name or by content, such as "
            f"{'; '.join(found[:LISTED])}; give a set without them, or say --allow-leakage, which "
            "the result will tell"
        )
