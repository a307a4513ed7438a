"""Packed clips on disk: WebDataset tars with an index beside each, written whole or not at all.

A tier is a folder of `NNNNNN.tar` (samples), `NNNNNN.idx` (byte offsets, in the text format of
DALI's `wds2idx`, v1.2) and one `index.json`, which is written last: a folder that has it is
complete. Training reads single members by offset, never whole tars, so any order of samples costs
the bytes of the members it wants. Members are addressed by a list of known extensions and returned
as bytes: nothing in a shard can make the reader run code or leave the folder.
"""

import hashlib
import json
import os
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SCHEMA = 1
AUDIO_HZ = 16000
FRAMES_PER_CLIP = 10
TIERS = ("frames", "video")
EXTENSIONS = {
    "frames": ("json", "flac", *(f"{number}.jpg" for number in range(FRAMES_PER_CLIP))),
    "video": ("json", "flac", "mp4"),
}
"""Members of a sample in the order in which they lie in the tar."""

OPEN_SHARDS = 384
"""Shards whose index and file a `ShardSet` keeps open; 64 lanes with a window of 4,096 samples
have about 320 in use at once, and processes may commonly hold 1,024 files."""


class ShardError(ValueError):
    """A sample that can never be read: damaged bytes, not a failed transfer.

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
    """One finished shard as `index.json` lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class MemberIndex(NamedTuple):
    """Where the members of one shard lie: `offset` and `size` in bytes, (samples, members)."""

    keys: np.ndarray
    extensions: tuple[str, ...]
    offset: np.ndarray
    size: np.ndarray


def read_index(folder: Path) -> dict[str, Any]:
    """Read and check `index.json` of one tier.

    Raises:
        FileNotFoundError: the folder has no `index.json`.
        ValueError: it is damaged or of another schema.
    """
    path = folder / "index.json"
    if not path.is_file():
        tiers = [tier for tier in TIERS if (folder / tier / "index.json").is_file()]
        if tiers:
            raise FileNotFoundError(f"{folder} holds several tiers; use {folder / tiers[0]}")
        raise FileNotFoundError(
            f"{path} does not exist: not a folder of packed shards, or packing was not finished "
            f"(run `cavmae pack` on it again)"
        )
    try:
        index = json.loads(path.read_bytes())
        schema = index["schema"]
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema}, this version reads {SCHEMA}")
        if index["tier"] not in TIERS:
            raise ValueError(f"its tier is {index['tier']!r}, not one of {', '.join(TIERS)}")
        index["shards"] = [ShardEntry(**entry) for entry in index["shards"]]
        for entry in index["shards"]:
            if Path(entry.name).name != entry.name or Path(entry.name).suffix != ".tar":
                raise ValueError(f"it lists {entry.name!r}, which is not the name of a tar")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be used ({error}); pack the videos again") from error
    return index


def read_member_index(path: Path) -> MemberIndex:
    """Read a `.idx` file (DALI wds2idx v1.2) whose samples all have the same members.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such an index.
    """
    lines = path.read_text().splitlines()
    header = lines[0].split() if lines else []
    if len(header) != 2 or header[0] != "v1.2" or header[1] != str(len(lines) - 1):
        raise ValueError(f"{path} is damaged: {len(lines)} lines under the header {header}")
    fields = [line.split(" ") for line in lines[1:]]
    extensions = tuple(fields[0][0::4]) if fields else ()
    for number, sample in enumerate(fields, start=2):
        if len(sample) != 4 * len(extensions) or tuple(sample[0::4]) != extensions:
            raise ValueError(f"{path}, line {number}: not the members {' '.join(extensions)}")
    keys = np.array([sample[3].split(".")[0] for sample in fields])
    offset = np.array([sample[1::4] for sample in fields], dtype=np.int64)
    size = np.array([sample[2::4] for sample in fields], dtype=np.int64)
    return MemberIndex(keys, extensions, offset, size)


class _OpenShard:
    def __init__(self, folder: Path, name: str, samples: int):
        self.index = read_member_index(folder / f"{Path(name).stem}.idx")
        if len(self.index.offset) != samples:
            raise ValueError(
                f"{folder / name}: its .idx lists {len(self.index.offset)} samples, "
                f"index.json {samples}; pack the videos again"
            )
        self.descriptor = os.open(folder / name, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardSet:
    """The packed clips of one tier, read member by member.

    Reading is safe from several threads. A copy in another process (pickled) opens its own files.

    Args:
        folder: a folder with `index.json`, such as `shards/video`.

    Raises:
        FileNotFoundError: no `index.json` there.
        ValueError: `index.json` is damaged or of another schema.
    """

    folder: Path
    tier: str
    video_codec: str | None
    frame_choice: str
    sizes: tuple[int, ...]
    """Samples of each shard."""
    samples: int
    fingerprint: str
    """Changes when the bytes of any shard do."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.tier = index["tier"]
        self.video_codec = index["video_codec"]
        self.frame_choice = index["frame_choice"]
        self.names: tuple[str, ...] = tuple(entry.name for entry in index["shards"])
        self.sizes = tuple(entry.samples for entry in index["shards"])
        self.samples = sum(self.sizes)
        digests = "".join(entry.sha256 for entry in index["shards"])
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()
        self._start_reading()

    def _start_reading(self) -> None:
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._describe = lru_cache(maxsize=256)(self._read_description)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_reading()

    def sample_id(self, shard: int, sample: int) -> str:
        """A name of the sample that stays the same in all runs, such as `000003/000003017`."""
        return f"{Path(self.names[shard]).stem}/{self._shard(shard).index.keys[sample]}"

    def description(self, shard: int, sample: int) -> dict[str, Any]:
        """The sample's JSON, parsed; shared between calls, so not to be changed.

        Raises:
            OSError: the shard cannot be read.
            ShardError: the JSON is damaged.
        """
        return self._describe(shard, sample)

    def member(self, shard: int, sample: int, extension: str) -> bytes:
        """Bytes of one member, checked against the CRC-32 in the sample's JSON.

        Raises:
            OSError: the shard cannot be read.
            ShardError: the bytes are damaged.
            ValueError: this tier has no such member.
        """
        data = self._read(shard, sample, extension)
        if extension == "json":
            return data
        expected = self.description(shard, sample)["crc32"].get(extension)
        if expected is not None and zlib.crc32(data) != expected:
            raise ShardError("crc_mismatch", f"{extension} of {self._place(shard, sample)}")
        return data

    def _place(self, shard: int, sample: int) -> str:
        return f"sample {sample} of {self.folder / self.names[shard]}"

    def _read_description(self, shard: int, sample: int) -> dict[str, Any]:
        try:
            description = json.loads(self._read(shard, sample, "json"))
        except ValueError as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError("bad_json", f"{self._place(shard, sample)}: {error}") from error
        if not isinstance(description, dict) or description.get("schema") != SCHEMA:
            raise ShardError("bad_schema", f"{self._place(shard, sample)}: not schema {SCHEMA}")
        if not isinstance(description.get("crc32"), dict) or "key" not in description:
            raise ShardError("bad_schema", f"{self._place(shard, sample)}: no key or crc32")
        return description

    def _read(self, shard: int, sample: int, extension: str) -> bytes:
        opened = self._shard(shard)
        if extension not in EXTENSIONS[self.tier]:
            raise ValueError(
                f"a sample of the {self.tier} tier has no {extension!r}; "
                f"it has {', '.join(EXTENSIONS[self.tier])}"
            )
        if extension not in opened.index.extensions:
            raise ShardError("missing_member", f"{extension} in {self.folder / self.names[shard]}")
        column = opened.index.extensions.index(extension)
        offset = int(opened.index.offset[sample, column])
        size = int(opened.index.size[sample, column])
        parts = []
        while size > 0:
            part = os.pread(opened.descriptor, size, offset)
            if not part:
                raise ShardError("short_read", f"{extension} of {self._place(shard, sample)}")
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def _shard(self, shard: int) -> _OpenShard:
        with self._lock:
            opened = self._open.get(shard)
            if opened is None:
                opened = _OpenShard(self.folder, self.names[shard], self.sizes[shard])
                self._open[shard] = opened
            self._open.move_to_end(shard)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return opened
