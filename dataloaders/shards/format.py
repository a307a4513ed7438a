"""The files of a packed set as bytes: `index.json`, `NNNNNN.idx`, `content.npy` and the JSON of a
sample.

Everything read from them is checked here, whoever wrote it. `SCHEMA` changes with any key of a file
that packing writes, and sets of another schema are refused. What a set of one modality lacks, its
files do not mention; its `index.json` names the one (`modality`), which no other has.
"""

import json
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from cavmae.dataloaders.constants import AUDIO_CODECS, FRAMES_PER_CLIP, TIERS, Modalities

SCHEMA = 5

CONTENT_FILE = "content.npy"
"""Of each clip of a tier the content hash, `(samples,)` uint64 in packing order."""
_CRC32_KEY = ',"crc32":'


class ShardError(ValueError):
    """A sample can never be read: its bytes are damaged, as opposed to a failed transfer.

    Attributes:
        reason: `short_read`, `crc_mismatch`, `bad_json`, `bad_schema` or `missing_member`.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard, as `index.json` lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class MemberIndex(NamedTuple):
    """Locates the members of one shard: `offset` and `size` are `(samples, members)` int64 bytes,
    `keys` is `(samples,)` text."""

    keys: np.ndarray
    extensions: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray


def member_names(tier: str, audio_codec: str, modality: Modalities = "both") -> tuple[str, ...]:
    """Extensions of a sample's members, in the order of the tar.

    The extension of the audio is its codec. `source` is the original file, in any format.
    """
    frames = {
        "frames": tuple(f"{number}.jpg" for number in range(FRAMES_PER_CLIP)),
        "video": ("mp4",),
        "original": ("source",),
        "audio": (),
    }
    sound = () if modality == "video" else (audio_codec,)
    return ("json", *sound, *frames[tier])


def parse_index(data: bytes, location: str) -> dict[str, Any]:
    """Parse and check the `index.json` of a tier; its `shards` become `ShardEntry`s.

    Args:
        data: content of the file.
        location: path or URL of the file, for the error.

    Raises:
        ValueError: the index is damaged or has another schema.
    """
    index: Any = None
    try:
        index = json.loads(data)
        check_schema(index["schema"])
        tier = index["tier"]
        if tier not in TIERS:
            raise ValueError(f"its tier is {tier!r}, not one of {', '.join(TIERS)}")
        if index["audio_codec"] not in AUDIO_CODECS:
            raise ValueError(
                f"its audio_codec is {index['audio_codec']!r}, not one of {', '.join(AUDIO_CODECS)}"
            )
        modality = index.get("modality", "both")
        if modality not in get_args(Modalities) or (modality == "audio") != (tier == "audio"):
            raise ValueError(f"its tier is {tier} and its modality {modality!r}")
        kinds = {
            "frame_choice": str,
            "video_codec": str | None,
            "samples": int,
            "content_sha256": str,
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(index[name], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {index[wrong[0]]!r}")
        index["modality"] = modality
        index["shards"] = [_entry(**entry) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{location} cannot be used ({type(error).__name__}: {error}); "
            f"pack the videos again, into a new folder: `{_pack_command(index)}`"
        ) from error
    return index


def _pack_command(index: Any) -> str:
    """The command that packs a set again with the options that its index states."""
    stated = index if isinstance(index, dict) else {}
    options = {
        "--modality": stated.get("modality"),
        "--tiers": stated.get("tier"),
        "--audio-codec": stated.get("audio_codec"),
        "--video-codec": stated.get("video_codec"),
        "--short-side": stated.get("short_side"),
        "--frame-choice": stated.get("frame_choice"),
    }
    words = [f"{name} {shlex.quote(str(value))}" for name, value in options.items() if value]
    return " ".join(["cavmae pack VIDEOS OUT", *words])


def check_schema(schema: object) -> None:
    """Refuse what another version of cavmae has written.

    Raises:
        ValueError: names both schemas.
    """
    if schema != SCHEMA:
        raise ValueError(
            f"it was packed with schema {schema}, by another version of cavmae; "
            f"this version reads schema {SCHEMA}"
        )


def _entry(name: Any, samples: Any, bytes: Any, sha256: Any) -> ShardEntry:
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".tar":
        raise ValueError(f"it lists {name!r}, which is not the name of a tar file")
    if not isinstance(sha256, str) or not all(
        isinstance(number, int) and number > 0 for number in (samples, bytes)
    ):
        raise ValueError(f"it lists {name} with {samples!r} samples of {bytes!r} bytes")
    return ShardEntry(name, samples, bytes, sha256)


def parse_member_index(data: bytes, location: str) -> MemberIndex:
    """Parse a `.idx` file (DALI wds2idx v1.2) whose samples all have the same members.

    Args:
        data: content of the file.
        location: path or URL of the file, for the error.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        lines = data.decode().splitlines()
        header = lines[0].split() if lines else []
        if len(header) != 2 or header[0] != "v1.2" or header[1] != str(len(lines) - 1):
            raise ValueError(f"{len(lines)} lines under the header {header}")
        fields = [line.split(" ") for line in lines[1:]]
        extensions = tuple(fields[0][0::4]) if fields else ()
        for number, sample in enumerate(fields, start=2):
            if len(sample) != 4 * len(extensions) or tuple(sample[0::4]) != extensions:
                raise ValueError(f"line {number} does not list {' '.join(extensions)}")
        keys = np.array([sample[3].split(".")[0] for sample in fields])
        offset = np.array([sample[1::4] for sample in fields], dtype=np.int64)
        size = np.array([sample[2::4] for sample in fields], dtype=np.int64)
        if min(offset.min(initial=0), size.min(initial=0)) < 0:
            raise ValueError("an offset or a size below 0")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{location} is damaged: {error}") from error
    return MemberIndex(keys, extensions, offset, size)


def description_bytes(description: dict[str, Any], crc32: dict[str, int]) -> bytes:
    """Encode the JSON of a sample: its last key has the CRC-32 of each member, and of the text
    before that key."""
    text = json.dumps(description, separators=(",", ":"))[:-1]
    sums = {"json": zlib.crc32(text.encode()), **crc32}
    return f"{text}{_CRC32_KEY}{json.dumps(sums, separators=(',', ':'))}}}".encode()


def clip_seconds(description: dict[str, Any]) -> float:
    """Length of a clip by its JSON: of its sound, or of pictures alone."""
    if "audio" in description:
        return description["audio"]["samples"] / description["audio"]["hz"]
    return description["video"]["seconds"]


def parse_description(data: bytes) -> dict[str, Any]:
    """Parse the JSON of a sample and check its own checksum.

    Raises:
        ShardError: the JSON is damaged or has another schema.
    """
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError("bad_json", str(error)) from error
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        raise ShardError("bad_schema", f"not schema {SCHEMA}")
    if not isinstance(description.get("crc32"), dict) or "key" not in description:
        raise ShardError("bad_schema", "no key or crc32")
    text, found, _ = data.rpartition(_CRC32_KEY.encode())
    if found and description["crc32"].get("json", zlib.crc32(text)) != zlib.crc32(text):
        raise ShardError("crc_mismatch", "")
    return description
