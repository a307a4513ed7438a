"""Lists videos inside WebDataset tars of other packers: `KEY.mp4` with an optional `KEY.json`.

Nothing is extracted: a video is decoded inside the tar, by offset and size. A tar with names that
lead out of it (absolute, `..`) is refused; links and devices are ignored, and members that are
neither videos nor JSON are never read.
"""

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".source")
"""The last is from the `original` tier, which can be packed again."""
LARGEST_JSON = 1 << 20
"""Bytes; a larger file cannot be the description of a clip."""


def list_tar(path: Path) -> list[tuple[tarfile.TarInfo, dict[str, Any]]]:
    """List the videos of a tar in order, from its headers and JSON members.

    Returns:
        Each video, with the content of the JSON that has the same key; empty if there is none.

    Raises:
        OSError: the tar cannot be read.
        ValueError: the file is not a tar, a name leads out of it, or a JSON is damaged.
    """
    videos: dict[str, tarfile.TarInfo] = {}
    descriptions: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"{path} has a member {member.name!r}, which leads out of it")
                key = str(name.with_suffix(""))
                if not member.isfile():
                    continue
                if name.suffix.lower() in VIDEOS:
                    videos[key] = member
                elif name.suffix == ".json":
                    content = tar.extractfile(member)
                    assert content is not None
                    descriptions[key] = _description(path, member, content.read(LARGEST_JSON + 1))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a tar of videos ({error})") from error
    return [(video, descriptions.get(key, {})) for key, video in videos.items()]


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
