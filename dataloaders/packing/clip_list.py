"""Lists the clips to pack: of a folder of videos or tars, a tar, a CSV file, published JSON, or a
published set of sounds.

The order of this list is the order of the shards, and a clip's position in it is its key, so the
list depends only on names: folders are sorted by path, CSV files keep their order.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.packing.sound_lists import (
    ESC50_COLUMNS,
    ListedSound,
    esc50,
    is_speech_commands,
    of_parts,
    speech_commands,
)
from cavmae.dataloaders.packing.tar_source import SOUNDS, VIDEOS, list_tar
from cavmae.text_table import TextTable, in_utf8, read_table

TEXT = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".md", ".rst", ".xml", ".yaml", ".yml", ".log")
SUBTITLES_AND_SUMS = (".srt", ".vtt", ".ass", ".md5", ".sha256")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SIDECAR_SUFFIXES = frozenset({*TEXT, *SUBTITLES_AND_SUMS, *PICTURES})
"""Files beside videos that are not tried."""
COLUMNS = ("path", "start", "end", "labels")
MAXIMUM_WINDOW_SECONDS = 600.0


@dataclass(frozen=True)
class ListedClip:
    """A clip to pack."""

    path: str
    """Path of the file."""
    source: str
    """Name of the file in the list: relative to the folder, or as in the CSV. Bytes that are no
    UTF-8 are written as backslash escapes."""
    start_seconds: float = 0.0
    end_seconds: float | None = None
    """None: not given."""
    labels: tuple[str, ...] = ()
    part: tuple[int, int] | None = None
    """Offset and size of the video in a tar at `path`, in bytes."""
    frames: str | None = None
    """Folder of the ten JPEGs that belong to the audio at `path`; None: `path` is a video."""


@dataclass
class ClipList:
    """The clips to pack, and what was found beside them."""

    clips: list[ListedClip] = field(default_factory=list)
    not_used: dict[str, list[str]] = field(default_factory=dict)
    """Names of what gives no clip or no label, by what it is."""

    def leave_out(self, what: str, name: str) -> None:
        """Count something that is not used."""
        self.not_used.setdefault(what, []).append(in_utf8(name))

    def remarks(self) -> list[str]:
        """Lines that tell what was found and is not used, and which labels look like lists."""
        lines = [
            f"not used: {len(names)} {what}, such as {names[0]}"
            for what, names in self.not_used.items()
        ]
        commas = {label for clip in self.clips for label in clip.labels if "," in label}
        if commas:
            lines.append(
                f"{len(commas)} labels hold a comma, such as {min(commas)!r}: each is one label, "
                f"as `;` separates labels"
            )
        return lines


def list_clips(videos: Path, out: Path, modality: Modalities = "both", split: str = "") -> ClipList:
    """List the clips of a folder (all its files, sorted; the videos of tars), a tar, a table, or
    a JSON file in the published format (`{"data": [{"wav", "video_id", "video_path", "labels"}]}`);
    or the sounds of ESC-50 or Speech Commands.

    Args:
        videos: the list.
        out: folder of shards, which is not listed.
        modality: what is packed; of sound alone, tars may hold sounds.
        split: parts of ESC-50 or Speech Commands.

    Raises:
        FileNotFoundError: the folder or file does not exist, or has nothing to pack.
        ValueError: a line or an entry cannot be used (named), a tar is refused, or modality or
            split does not fit the list.
    """
    found = ClipList()
    sounds: list[ListedSound] | None = None
    media = VIDEOS | SOUNDS if modality == "audio" else VIDEOS
    if videos.is_dir() and is_speech_commands(videos):
        sounds = speech_commands(videos)
    elif videos.is_dir():
        _list_folder(videos, out, found, media, modality)
    elif videos.suffix.lower() == ".tar" and videos.is_file():
        _list_tar(videos, videos.name, found, media)
    elif videos.suffix.lower() == ".json" and videos.is_file():
        _list_json(videos, found, modality)
    elif videos.suffix.lower() in VIDEOS and videos.is_file():
        raise ValueError(f"{videos} is one video; give its folder, or a CSV file that lists it")
    elif videos.is_file():
        table = read_table(videos)
        if set(table.columns) >= ESC50_COLUMNS:
            sounds = esc50(videos, table)
        else:
            _list_table(videos, table, found)
    else:
        raise FileNotFoundError(
            f"{videos} does not exist; give a folder of videos or tars, a tar, a CSV or a JSON file"
        )
    if sounds is not None:
        if modality != "audio":
            raise ValueError(f"{videos} lists sounds; pack them with --modality audio")
        found.clips = [
            ListedClip(str(one.path), in_utf8(one.source), labels=(one.label,))
            for one in of_parts(sounds, split, videos)
        ]
    elif split:
        raise ValueError(
            f"split is {split!r}, and {videos} has no parts, as ESC-50 (its meta/esc50.csv) and "
            f"Speech Commands (its folder) have; omit it"
        )
    if not found.clips:
        raise FileNotFoundError("; ".join([f"no videos in {videos}", *found.remarks()]))
    return found


def clip_labels(value: object, location: str) -> tuple[str, ...]:
    """Labels of a clip, each once: of a list, or of a text in which `;` separates them, and `,`
    only those that begin with `/`, as AudioSet's do; None is no label.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, str):
        labels = re.split("[,;]", value)
        if not all(label.strip().startswith("/") for label in labels if label.strip()):
            labels = value.split(";")
    else:
        labels = [] if value is None else value
    if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
        raise ValueError(f"{location}: labels is {value!r}; use a text, a list of texts or null")
    return tuple(dict.fromkeys(in_utf8(one.strip()) for one in labels if one.strip()))


def _list_tar(path: Path, source: str, found: ClipList, media: frozenset[str]) -> None:
    for video, description in list_tar(path, found.not_used, media):
        location = f"{video.name} in {path}"
        window = {
            name: str(value)
            for name in ("start", "end")
            if (value := description.get(name)) is not None
        }
        start, end = _window(f"{location}, key", window)
        found.clips.append(
            ListedClip(
                path=str(path),
                source=in_utf8(f"{source}/{video.name}"),
                start_seconds=start,
                end_seconds=end,
                labels=clip_labels(description.get("labels"), location),
                part=(video.offset_data, video.size),
            )
        )


def _list_json(path: Path, found: ClipList, modality: Modalities) -> None:
    """List the clips of a published JSON; relative paths are resolved against its folder."""
    try:
        entries = json.loads(path.read_bytes())["data"]
        assert isinstance(entries, list)
    except (ValueError, RecursionError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a list in the published format, "
            f'{{"data": [{{"wav", "video_id", "video_path", "labels"}}]}} ({error})'
        ) from error
    for number, entry in enumerate(entries):
        fields = ("wav", "video_id", "video_path")
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), str) for name in fields
        ):
            raise ValueError(f"{place}: {', '.join(fields)} have to be strings")
        wav, video_id, frames = (entry[name] for name in fields)
        if video_id != in_utf8(video_id):
            raise ValueError(f"{place}: video_id {video_id!r} is no UTF-8; rename its files")
        if "labels" not in entry:
            raise ValueError(f"{place}: labels is missing; give null for a clip without any")
        labels = entry["labels"]
        found.clips.append(
            ListedClip(
                path=str(path.parent / wav),
                source=video_id,
                # The format separates labels by commas.
                labels=clip_labels(labels.split(",") if isinstance(labels, str) else labels, place),
                frames=None if modality == "audio" else str(path.parent / frames),
            )
        )


def _list_folder(
    folder: Path, out: Path, found: ClipList, media: frozenset[str], modality: Modalities
) -> None:
    skipped_folder = out.resolve()
    sources, pictures = [], []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in sorted(folders):
            path = Path(parent, name)
            if name.startswith("."):
                found.leave_out("hidden files and folders", str(path))
            elif path.is_symlink():
                found.leave_out("links to folders, which are not followed", str(path))
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(parent, name).resolve() != skipped_folder
        ]
        for name in sorted(names):
            path = Path(parent, name)
            if name.startswith("."):
                found.leave_out("hidden files and folders", str(path))
            elif path.suffix.lower() == ".json":
                found.leave_out("JSON files (labels of a folder come from a CSV file)", str(path))
            elif modality == "video" and path.suffix.lower() in PICTURES:
                pictures.append(path.relative_to(folder).as_posix())
            elif path.suffix.lower() in SIDECAR_SUFFIXES:
                found.leave_out("files of text, subtitles or pictures", str(path))
            elif path.is_file() or path.is_symlink():
                sources.append(path.relative_to(folder).as_posix())
            else:
                found.leave_out("pipes, sockets and devices", str(path))
    for source in pictures if sources else ():  # such as thumbnails
        found.leave_out("files of text, subtitles or pictures", source)
    for source in sorted(sources or pictures):
        if source.lower().endswith(".tar"):
            _list_tar(folder / source, source, found, media)
        else:
            found.clips.append(ListedClip(path=str(folder / source), source=in_utf8(source)))


def _raise(error: OSError) -> None:
    raise error


def _list_table(path: Path, table: TextTable, found: ClipList) -> None:
    _check_header(table)
    for place in table.empty_rows:
        found.leave_out("empty rows", place)
    for place, row in table.rows:
        if not row["path"]:
            raise ValueError(f"{place}, column path: it is empty")
        start, end = _window(f"{place}, column", row)
        labels = clip_labels(row.get("labels"), place)
        found.clips.append(
            ListedClip(str(path.parent / row["path"]), row["path"], start, end, labels)
        )
    _join_labels(found)


def _join_labels(found: ClipList) -> None:
    """Make one clip of rows that give the same clip other labels, as lists of events do; rows that
    are the same in all are copies, which packing names."""

    def window(clip: ListedClip) -> tuple[str, float, float | None]:
        return clip.path, clip.start_seconds, clip.end_seconds

    rows: dict[tuple[str, float, float | None], list[ListedClip]] = {}
    for clip in found.clips:
        rows.setdefault(window(clip), []).append(clip)
    clips, found.clips = found.clips, []
    for clip in clips:
        same = rows[window(clip)]
        if len({frozenset(one.labels) for one in same}) == 1:
            found.clips.append(clip)
        elif clip is same[0]:
            labels = dict.fromkeys(label for one in same for label in one.labels)
            found.clips.append(replace(clip, labels=tuple(labels)))
        else:
            found.leave_out("rows of a clip listed before, whose labels were joined", clip.source)


def _check_header(table: TextTable) -> None:
    first, *others = table.columns
    if re.fullmatch(r"[\w-]{11}", first) and others and others[0].replace(".", "").isdigit():
        raise ValueError(
            f"{table.place}: {first!r} is no column, but like an id of YouTube in the lists of "
            f"AudioSet and VGGSound, which name no files; write a list with the columns "
            f"{','.join(COLUMNS)} of the files that you have (docs/training/data.md shows how)"
        )
    for column in table.columns:
        if column not in COLUMNS:
            raise ValueError(
                f"{table.place}: unknown column {column!r}; the columns are {','.join(COLUMNS)}"
            )
    if "path" not in table.columns:
        raise ValueError(f"{table.place}: the column 'path' is missing")


def _window(location: str, fields: Mapping[str, str]) -> tuple[float, float | None]:
    """Parse start (default 0) and end, in seconds."""
    start = _seconds(f"{location} start", fields.get("start", "")) or 0.0
    end = _seconds(f"{location} end", fields.get("end", ""))
    if end is not None and not start < end <= start + MAXIMUM_WINDOW_SECONDS:
        raise ValueError(
            f"{location} end: {end:g} must be after start {start:g}, "
            f"by {MAXIMUM_WINDOW_SECONDS:g} s at most"
        )
    return start, end


def _seconds(location: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"{location}: {text!r} is not a number of seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{location}: {text!r} is not 0 or more seconds")
    return seconds


def list_digest(clips: list[ListedClip]) -> str:
    """SHA-256 of the list's content, independent of the paths of the files."""
    digest = hashlib.sha256()
    for clip in clips:
        line = [clip.source, clip.start_seconds, clip.end_seconds, clip.labels, clip.part]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()
