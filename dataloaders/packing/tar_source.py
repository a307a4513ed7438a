"""Videos inside WebDataset tars, as others have packed them: `KEY.mp4` with `KEY.json` beside it.

Nothing is extracted: a video is decoded where it lies, by offset and size. Members that could lead
out of the tar (absolute names, `..`) make it refused; links and devices are no members here, and
what is neither a video nor JSON is never read.
"""

import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

VIDEOS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".source")
"""The last is what the `original` tier keeps, which can be packed again."""
LARGEST_JSON = 1 << 20
"""Bytes; more is no description of a clip."""


@dataclass(frozen=True)
class TarVideo:
    """A video in a tar.

    Attributes:
        name: of the member.
        offset, size: its bytes.
        description: of the JSON beside it; empty where there is none.
    """

    name: str
    offset: int
    size: int
    description: dict[str, Any]


def list_tar(path: Path) -> list[TarVideo]:
    """The videos of a tar in its order; reads the headers and the JSON.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no tar, or a name would lead out of it, or a JSON is damaged.
    """
    videos: dict[str, TarVideo] = {}
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
                    videos[key] = TarVideo(member.name, member.offset_data, member.size, {})
                elif name.suffix == ".json":
                    content = tar.extractfile(member)
                    assert content is not None
                    descriptions[key] = _description(path, member, content.read(LARGEST_JSON + 1))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a tar of videos ({error})") from error
    return [replace(video, description=descriptions.get(key, {})) for key, video in videos.items()]


def _description(path: Path, member: tarfile.TarInfo, data: bytes) -> dict[str, Any]:
    place = f"{member.name} in {path}"
    if len(data) > LARGEST_JSON:
        raise ValueError(f"{place} has more than {LARGEST_JSON} bytes")
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{place} is not a JSON object")
    return description
