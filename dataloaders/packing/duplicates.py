"""Finds duplicate clips by content, and clips that another set has too.

A clip's content is the SHA-256 of the audio and frames that were decoded for it, so it does not
depend on names, metadata, or how the clip is stored. Reports of finished shards record it for a
resume: which of two equal clips is the first does not depend on when they were packed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cavmae.dataloaders.packing.output_folder import finished_reports

LISTED = 5
"""Number of clips that an error names."""


class LeakageError(ValueError):
    """Clips of the list are also in an excluded set."""


@dataclass
class KnownContent:
    """Maps the content of one set's clips to the first clip; about 150 bytes of memory a clip."""

    first: dict[str, int] = field(default_factory=dict)

    def add(self, content: str, number: int) -> int | None:
        """Record a clip; returns the number of an equal clip before it, if there is one."""
        first = self.first[content] = min(number, self.first.get(content, number))
        return first if first < number else None


def source_id(source: str) -> str:
    """The name that identifies a clip in any set: its file's, without folders and extension."""
    return Path(source).stem


class OtherSets:
    """Names and content of the clips of sets that must not share clips with this one.

    Args:
        folders: written by `cavmae pack`.

    Raises:
        FileNotFoundError: a folder has no reports of finished shards.
    """

    def __init__(self, folders: Iterable[str]):
        self.names: dict[str, str] = {}
        self.content: dict[str, str] = {}
        for folder in folders:
            reports = 0
            for report in finished_reports(Path(folder)):
                reports += 1
                for clip in report["packed"]:
                    location = f"{folder}, {clip['key']}"
                    self.names.setdefault(source_id(clip["source"]), location)
                    self.content.setdefault(clip["content"], location)
            if not reports:
                raise FileNotFoundError(
                    f"{folder} has no finished shards; --not-in takes a folder that "
                    f"`cavmae pack` has written"
                )

    def check_names(self, sources: Iterable[str]) -> None:
        """Refuse a list that shares clips with those sets by name.

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
                f"{'; '.join(found[:LISTED])}; remove them from the list, or use --allow-leakage"
            )

    def check_content(self, source: str, content: str) -> None:
        """Refuse a clip whose audio and frames are in those sets under any name.

        Raises:
            LeakageError: names both clips.
        """
        if content in self.content:
            raise LeakageError(
                f"{source} has the audio and frames of {self.content[content]}, a set of "
                f"--not-in; remove it from the list, or use --allow-leakage"
            )
