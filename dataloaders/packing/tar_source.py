"""Lists videos, or sounds, inside WebDataset tars of other packers: `KEY.mp4` with an optional
`KEY.json`.

Nothing is extracted: a video is decoded inside the tar, by offset and size. A tar with names that
lead out of it (absolute, `..`) is refused; links and devices are ignored, and members that are
neither videos nor JSON are never read.
"""

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

_COMMON = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
VIDEOS = frozenset({*_COMMON, ".3gp", ".flv", ".m2ts", ".mts", ".ogv", ".source"})
"""`.source` is from the `original` tier, which can be packed again."""
SOUNDS = frozenset({".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav"})
LARGEST_JSON = 1 << 20
"""Bytes; a larger file cannot be the description of a clip."""


def list_tar(
    path: Path, not_used: dict[str, list[str]], media: frozenset[str]
) -> list[tuple[tarfile.TarInfo, dict[str, Any]]]:
    """List the videos of a tar in order, from its headers and JSON members.

    Args:
        path: the tar.
        not_used: gets the names of members that give nothing, by what they are.
        media: endings of the members that are listed.

    Returns:
        Each video, with the content of the JSON that has the same key; empty if there is none.

    Raises:
        OSError: the tar cannot be read.
        ValueError: the file is not a tar, a name leads out of it, or a JSON is damaged.
    """
    videos: dict[str, tarfile.TarInfo] = {}
    descriptions: dict[str, tuple[str, dict[str, Any]]] = {}

    def leave_out(what: str, member: str) -> None:
        not_used.setdefault(what, []).append(f"{member} in {path}")

    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"{path} has a member {member.name!r}, which leads out of it")
                if member.isdir():
                    continue
                if not member.isfile():
                    leave_out("links and devices in tars", member.name)
                elif name.suffix.lower() in media:
                    if member.name in videos:
                        leave_out("videos in tars with a later one of the same name", member.name)
                    videos[member.name] = member
                elif name.suffix.lower() == ".json":
                    content = tar.extractfile(member)
                    assert content is not None
                    description = _description(path, member, content.read(LARGEST_JSON + 1))
                    descriptions[str(name.with_suffix(""))] = (member.name, description)
                else:
                    leave_out("files in tars that are neither videos nor JSON", member.name)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a tar of videos ({error})") from error
    keys = {name: str(PurePosixPath(name).with_suffix("")) for name in videos}
    keys_of_videos = set(keys.values())
    for key, (name, description) in descriptions.items():
        if key not in keys_of_videos:
            leave_out("JSON files in tars that belong to no video, as KEY.json does", name)
        elif "labels" not in description:
            leave_out("JSON files in tars without labels", name)
    return [(video, descriptions.get(keys[name], ("", {}))[1]) for name, video in videos.items()]


def _description(path: Path, member: tarfile.TarInfo, data: bytes) -> dict[str, Any]:
    location = f"{member.name} in {path}"
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{location} has more than {LARGEST_JSON} bytes")
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{location} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{location} is not a JSON object")
    return description
