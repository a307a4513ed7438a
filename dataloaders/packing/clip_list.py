"""Lists the clips to pack: of a folder of videos or tars, a tar, a CSV file, or published JSON.

The order of this list is the order of the shards, and a clip's position in it is its key, so the
list depends only on names: folders are sorted by path, CSV files keep their order.
"""

import csv
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cavmae.dataloaders.packing.tar_source import list_tar

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
    """Name of the file in the list: relative to the folder, or as in the CSV."""
    start_seconds: float = 0.0
    end_seconds: float | None = None
    """None: not given."""
    labels: tuple[str, ...] = ()
    part: tuple[int, int] | None = None
    """Offset and size of the video in a tar at `path`, in bytes."""
    frames: str | None = None
    """Folder of the ten JPEGs that belong to the audio at `path`; None: `path` is a video."""


def list_clips(videos: Path, out: Path) -> list[ListedClip]:
    """List the clips of a folder (all its files, sorted; the videos of tars), a tar, a CSV file, or
    a JSON file in the published format (`{"data": [{"wav", "video_id", "video_path", "labels"}]}`).

    Raises:
        FileNotFoundError: the folder or file does not exist, or has nothing to pack.
        ValueError: a line or an entry cannot be used (named), or a tar is refused.
    """
    if videos.is_dir():
        return _list_folder(videos, out)
    if videos.suffix.lower() == ".tar" and videos.is_file():
        return _found(_list_tar(videos, videos.name), videos)
    if videos.suffix.lower() == ".json" and videos.is_file():
        return _found(_list_json(videos), videos)
    if videos.is_file():
        return _list_csv(videos)
    raise FileNotFoundError(
        f"{videos} does not exist; give a folder of videos or tars, a tar, a CSV or a JSON file"
    )


def _found(clips: list[ListedClip], path: Path) -> list[ListedClip]:
    if not clips:
        raise FileNotFoundError(f"no videos in {path}")
    return clips


def _split_labels(text: str, separator: str) -> tuple[str, ...]:
    return tuple(label.strip() for label in text.split(separator) if label.strip())


def _list_tar(path: Path, source: str) -> list[ListedClip]:
    clips = []
    for video, description in list_tar(path):
        location = f"{video.name} in {path}"
        labels = description.get("labels", ())
        if isinstance(labels, str):
            labels = labels.split(",")
        if not isinstance(labels, list | tuple) or not all(isinstance(one, str) for one in labels):
            raise ValueError(f"{location}: labels is {labels!r}; use strings")
        window = {
            name: str(value)
            for name in ("start", "end")
            if (value := description.get(name)) is not None
        }
        start, end = _window(f"{location}, key", window)
        clips.append(
            ListedClip(
                path=str(path),
                source=f"{source}/{video.name}",
                start_seconds=start,
                end_seconds=end,
                labels=tuple(label.strip() for label in labels if label.strip()),
                part=(video.offset_data, video.size),
            )
        )
    return clips


def _list_json(path: Path) -> list[ListedClip]:
    """List the clips of a published JSON; relative paths are resolved against its folder."""
    try:
        entries = json.loads(path.read_bytes())["data"]
        assert isinstance(entries, list)
    except (ValueError, RecursionError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is not a list in the published format, "
            f'{{"data": [{{"wav", "video_id", "video_path", "labels"}}]}} ({error})'
        ) from error
    clips = []
    for number, entry in enumerate(entries):
        fields = ("wav", "video_id", "video_path", "labels")
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(name), str) for name in fields
        ):
            raise ValueError(f"{path}, entry {number}: {', '.join(fields)} have to be strings")
        wav, video_id, frames, labels = (entry[name] for name in fields)
        clips.append(
            ListedClip(
                path=str(path.parent / wav),
                source=video_id,
                labels=_split_labels(labels, ","),
                frames=str(path.parent / frames),
            )
        )
    return clips


def _list_folder(folder: Path, out: Path) -> list[ListedClip]:
    skipped_folder = out.resolve()
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(parent, name).resolve() != skipped_folder
        ]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or path.suffix.lower() in SIDECAR_SUFFIXES:
                continue
            if path.is_file() or path.is_symlink():  # Never a pipe or a device.
                found.append(path.relative_to(folder).as_posix())
    if not found:
        raise FileNotFoundError(f"no videos in {folder}: it has no files that could be one")
    clips = []
    for source in sorted(found):
        if source.lower().endswith(".tar"):
            clips += _list_tar(folder / source, source)
        else:
            clips.append(ListedClip(path=str(folder / source), source=source))
    return clips


def _raise(error: OSError) -> None:
    raise error


def _list_csv(path: Path) -> list[ListedClip]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            rows = csv.reader(file, strict=True)
            header = next(rows, None)
            if header is None:
                raise ValueError(f"{path} is empty; its first line must be {','.join(COLUMNS)}")
            _check_header(path, header)
            clips = []
            for row in rows:
                if row:
                    line = f"{path}, line {rows.line_num}"
                    if len(row) != len(header):
                        raise ValueError(
                            f"{line}: {len(row)} columns, the header has {len(header)}"
                        )
                    clips.append(_row(line, path.parent, dict(zip(header, row, strict=True))))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} is not a CSV file in UTF-8 ({error}); give a folder or a CSV file"
            ) from error
    if not clips:
        raise FileNotFoundError(f"no videos in {path}: it has a header and no lines")
    return clips


def _check_header(path: Path, header: list[str]) -> None:
    for column in header:
        if column not in COLUMNS:
            raise ValueError(
                f"{path}, line 1: unknown column {column!r}; the columns are {','.join(COLUMNS)}"
            )
        if header.count(column) > 1:
            raise ValueError(f"{path}, line 1: column {column!r} is duplicated")
    if "path" not in header:
        raise ValueError(f"{path}, line 1: the column 'path' is missing")


def _row(line: str, folder: Path, row: dict[str, str]) -> ListedClip:
    if not row["path"]:
        raise ValueError(f"{line}, column path: it is empty")
    start, end = _window(f"{line}, column", row)
    labels = _split_labels(row.get("labels", ""), ";")
    return ListedClip(str(folder / row["path"]), row["path"], start, end, labels)


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
