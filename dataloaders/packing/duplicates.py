"""Finds duplicate clips by content, and clips that another set has too.

A clip's content is the SHA-256 of the audio and frames that were decoded of it, so it does not
depend on names, metadata, tiers, codecs and sizes. A name is no content: `dog/0001.mp4` is another
clip in every data set. Only a YouTube id with its start means the same clip everywhere. Reports of
finished shards record both for a resume: which of two equal clips is the first does not depend on
when they were packed.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cavmae.atomic_write import read_json
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.packing.output_folder import finished_reports
from cavmae.dataloaders.shards.format import check_schema

LISTED = 5
"""Number of clips that an error names."""
_VIDEOS = (
    ".mp4 .m4v .mov .mkv .webm .avi .flv .f4v .mpg .mpeg .ts .m2ts .mts .3gp .ogv .wmv .source"
)
_EXTENSIONS = frozenset(f"{_VIDEOS} .wav .flac .m4a .mp3 .ogg .opus".split())
_YOUTUBE_ID = re.compile(r"[\w-]{11}(_\d{6}|_\d+\.\d+|(_\d+(\.\d+)?){2})", re.ASCII)
"""As in the published lists: id and start, or start and end, of VGGSound (`ID_000030`) and AudioSet
(`ID_30.000`, `ID_30.000_40.000`, `ID_30000_40000`)."""


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
    """The name of a clip as its list gives it, folders included, without the file's extension; a
    dot may be part of an id (`ID_30.000`)."""
    path = PurePosixPath(source)
    return str(path.with_suffix("")) if path.suffix.lower() in _EXTENSIONS else source


def youtube_id(source: str) -> str | None:
    """The YouTube id and start that a clip is named by, in whatever folder; None if it is not."""
    name = PurePosixPath(source_id(source)).name
    return name if _YOUTUBE_ID.fullmatch(name) else None


class OtherSets:
    """Names and content of the clips of sets that must not share clips with this one.

    Args:
        folders: written by `cavmae pack`.
        modality: what this set has.

    Raises:
        FileNotFoundError: a folder has no reports of finished shards.
        ValueError: a folder was packed by another version, or has another modality, so that content
            can't be compared.
    """

    def __init__(self, folders: Iterable[str], modality: Modalities = "both"):
        self.names: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.content: dict[str, str] = {}
        for folder in folders:
            reports = 0
            for report in finished_reports(Path(folder)):
                reports += 1
                for clip in report["packed"]:
                    location = f"{folder}, {clip['key']}"
                    self.names.setdefault(source_id(clip["source"]), location)
                    if identified := youtube_id(clip["source"]):
                        self.ids.setdefault(identified, location)
                    self.content.setdefault(clip["content"], location)
            if not reports:
                raise FileNotFoundError(
                    f"{folder} has no finished shards; --not-in takes a folder that "
                    f"`cavmae pack` has written"
                )
            note = read_json(Path(folder, "pack.json"))
            try:
                check_schema(note["schema"])
            except ValueError as error:
                raise ValueError(f"--not-in {folder}: {error}; pack it again") from error
            packed = note["options"].get("modality", "both")
            if packed != modality:
                raise ValueError(
                    f"--not-in {folder} was packed with --modality {packed}, and clips are "
                    f"compared by what was packed of them; pack it with --modality {modality} too"
                )

    def check_ids(self, sources: Iterable[str]) -> None:
        """Refuse a list that shares clips with those sets by YouTube id and start.

        Raises:
            LeakageError: names some of them.
        """
        found = [
            f"{source} ({self.ids[identified]})"
            for source in sources
            if (identified := youtube_id(source)) in self.ids
        ]
        if found:
            raise LeakageError(
                f"{len(found)} clips of the list have the YouTube id and start of clips of "
                f"--not-in, such as {'; '.join(found[:LISTED])}; remove them from the list, or use "
                "--allow-same-ids"
            )

    def same_names(self, sources: Iterable[str]) -> str:
        """Tell of the clips of a list whose names, folders included, are in those sets; empty if
        there are none."""
        found = [
            f"{source} ({self.names[name]})"
            for source in sources
            if (name := source_id(source)) in self.names
        ]
        if not found:
            return ""
        return (
            f"{len(found)} clips of the list have the names of clips of --not-in, such as "
            f"{'; '.join(found[:LISTED])}; clips are compared by their sound and frames"
        )

    def shares(self, source: str, content: str) -> bool:
        """Return whether a clip is in those sets, by content or by YouTube id and start."""
        return content in self.content or youtube_id(source) in self.ids

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
