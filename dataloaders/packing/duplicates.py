"""What is known of packed clips by their content: duplicates, and clips that another set has too.

A clip's content is the SHA-256 of the sound and pictures that were packed for it, so it does not
depend on names, containers or metadata. Reports of finished shards keep it, and a restart reads it
from there: which of two equal clips is the first does not depend on when they were packed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cavmae.dataloaders.packing.output_folder import finished_reports

LISTED = 5
"""Clips that an error names."""


class LeakageError(ValueError):
    """Clips of the list are also in a set that they must not be in."""


@dataclass
class KnownContent:
    """Content of one set's clips, to find equal ones; about 150 bytes of memory a clip."""

    first: dict[str, int] = field(default_factory=dict)
    """Content: number of the first clip that has it."""

    def add(self, report: dict[str, Any]) -> None:
        """Note the clips of a finished shard."""
        for clip in report["packed"]:
            self.note(clip["content"], int(clip["key"]))

    def note(self, content: str, number: int) -> None:
        self.first[content] = min(number, self.first.get(content, number))

    def earlier(self, content: str, number: int) -> int | None:
        """The number of an equal clip before this one, if there is one."""
        found = self.first.get(content)
        return None if found is None or found >= number else found


def source_id(source: str) -> str:
    """The name by which a clip is known in any set: its file's, without folders and extension."""
    return Path(source).stem


class OtherSets:
    """Names and content of the clips of sets from which no clip may come again.

    Args:
        folders: that `cavmae pack` made.

    Raises:
        FileNotFoundError: one has no reports of finished shards.
    """

    def __init__(self, folders: Iterable[str]):
        self.names: dict[str, str] = {}
        self.content: dict[str, str] = {}
        for folder in folders:
            reports = 0
            for report in finished_reports(Path(folder)):
                reports += 1
                for clip in report["packed"]:
                    place = f"{folder}, {clip['key']}"
                    self.names.setdefault(source_id(clip["source"]), place)
                    self.content.setdefault(clip["content"], place)
            if not reports:
                raise FileNotFoundError(
                    f"{folder} has no finished shards; --not-in takes a folder that "
                    f"`cavmae pack` made"
                )

    def check_names(self, sources: Iterable[str]) -> None:
        """Refuse a list that has clips of those sets by name.

        Raises:
            LeakageError: names some of them.
        """
        found = [
            f"{source} ({self.names[name]})"
            for source in sources
            if (name := source_id(source)) in self.names
        ]
        if found:
            raise LeakageError(
                f"{len(found)} clips of the list are in a set of --not-in by name, such as "
                f"{'; '.join(found[:LISTED])}; take them out of the list, or say --allow-leakage"
            )

    def check_content(self, source: str, content: str) -> None:
        """Refuse a clip whose sound and pictures are in those sets under whatever name.

        Raises:
            LeakageError: names both.
        """
        if content in self.content:
            raise LeakageError(
                f"{source} has the sound and pictures of {self.content[content]}, a set of "
                f"--not-in; take it out of the list, or say --allow-leakage"
            )
