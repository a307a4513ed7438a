"""Packed clips on disk: WebDataset tars with an index beside each, written whole or not at all.

A tier is a folder of `NNNNNN.tar` (samples), `NNNNNN.idx` (byte offsets, in the text format of
DALI's `wds2idx`, v1.2) and one `index.json`, which is written last: a folder that has it is
complete. Training reads single members by offset, never whole tars, so any order of samples costs
the bytes of the members it wants. Members are addressed by a list of known extensions and returned
as bytes: nothing in a shard can make the reader run code or leave the folder.

Several sets of one tier are read as one: their shards are numbered through.
"""

import hashlib
import io
import json
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cavmae.dataloaders.shards.storage import (
    CacheSettings,
    LocalFolder,
    Storage,
    StoredFile,
    open_storage,
)

T = TypeVar("T")

SCHEMA = 2
AUDIO_HZ = 16000
AUDIO_CODECS = ("flac", "wav")
FRAMES_PER_CLIP = 10
TIERS = ("frames", "video", "original")

_SUMS = ',"crc32":'

KEPT_INDEXES = 384
"""Shards whose index a `ShardSet` keeps in memory; 64 lanes with a window of 4,096 samples have
about 320 in use at once."""


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


def member_names(tier: str, audio_codec: str) -> tuple[str, ...]:
    """Extensions of the members of a sample in the order in which they lie in the tar.

    The sound's is its codec. `source` is a file as it was packed, in whatever format.
    """
    pictures = {
        "frames": tuple(f"{number}.jpg" for number in range(FRAMES_PER_CLIP)),
        "video": ("mp4",),
        "original": ("source",),
    }
    return ("json", audio_codec, *pictures[tier])


def read_index(folder: str | Path) -> dict[str, Any]:
    """Read and check `index.json` of one tier, in a folder or at a URL.

    Raises:
        FileNotFoundError: the folder has no `index.json`.
        OSError: it cannot be read.
        ValueError: it is damaged or of another schema.
    """
    return _read_index(open_storage(folder, None))


def _read_index(storage: Storage) -> dict[str, Any]:
    place = storage.place("index.json")
    try:
        data = storage.read("index.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        folder = Path(place).parent
        tiers = [tier for tier in TIERS if (folder / tier / "index.json").is_file()]
        if tiers:
            raise FileNotFoundError(
                f"{folder} holds several tiers; use {folder / tiers[0]}"
            ) from error
        raise FileNotFoundError(
            f"{place} does not exist: not a folder of packed shards, or packing was not finished "
            f"(run `cavmae pack` on it again)"
        ) from error
    try:
        index = json.loads(data)
        if index["schema"] != SCHEMA:
            raise ValueError(f"its schema is {index['schema']}, this version reads {SCHEMA}")
        if index["tier"] not in TIERS:
            raise ValueError(f"its tier is {index['tier']!r}, not one of {', '.join(TIERS)}")
        if index["audio_codec"] not in AUDIO_CODECS:
            raise ValueError(
                f"its audio_codec is {index['audio_codec']!r}, not one of {', '.join(AUDIO_CODECS)}"
            )
        kinds = {"frame_choice": str, "video_codec": str | None, "samples": int}
        wrong = [name for name, kind in kinds.items() if not isinstance(index[name], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {index[wrong[0]]!r}")
        index["shards"] = [_entry(**entry) for entry in index["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{place} cannot be used ({type(error).__name__}: {error}); pack the videos again"
        ) from error
    return index


def _entry(name: Any, samples: Any, bytes: Any, sha256: Any) -> ShardEntry:
    if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != ".tar":
        raise ValueError(f"it lists {name!r}, which is not the name of a tar")
    if not isinstance(sha256, str) or not all(
        isinstance(number, int) and number > 0 for number in (samples, bytes)
    ):
        raise ValueError(f"it lists {name} with {samples!r} samples of {bytes!r} bytes")
    return ShardEntry(name, samples, bytes, sha256)


def parse_member_index(data: bytes, place: str) -> MemberIndex:
    """Parse a `.idx` file (DALI wds2idx v1.2) whose samples all have the same members.

    Args:
        data: its content.
        place: where it is, for the error.

    Raises:
        ValueError: it is not such an index.
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
                raise ValueError(f"line {number} has not the members {' '.join(extensions)}")
        keys = np.array([sample[3].split(".")[0] for sample in fields])
        offset = np.array([sample[1::4] for sample in fields], dtype=np.int64)
        size = np.array([sample[2::4] for sample in fields], dtype=np.int64)
        if min(offset.min(initial=0), size.min(initial=0)) < 0:
            raise ValueError("an offset or a size below 0")
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{place} is damaged: {error}") from error
    return MemberIndex(keys, extensions, offset, size)


def description_bytes(description: dict[str, Any], crc32: dict[str, int]) -> bytes:
    """The JSON of a sample as it is stored: its last key has the CRC-32 of each member, and of the
    text before that key."""
    text = json.dumps(description, separators=(",", ":"))[:-1]
    sums = {"json": zlib.crc32(text.encode()), **crc32}
    return f"{text}{_SUMS}{json.dumps(sums, separators=(',', ':'))}}}".encode()


def parse_description(data: bytes) -> dict[str, Any]:
    """The JSON of a sample, checked against the checksum of its own text.

    Raises:
        ShardError: it is damaged or of another schema.
    """
    try:
        description = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError("bad_json", str(error)) from error
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        raise ShardError("bad_schema", f"not schema {SCHEMA}")
    if not isinstance(description.get("crc32"), dict) or "key" not in description:
        raise ShardError("bad_schema", "no key or crc32")
    text, found, _ = data.rpartition(_SUMS.encode())
    if found and description["crc32"].get("json", zlib.crc32(text)) != zlib.crc32(text):
        raise ShardError("crc_mismatch", "")
    return description


def _has_crc32(expected: int | None) -> Callable[[bytes], None]:
    """A check of bytes against a CRC-32; None: none was noted."""

    def check(data: bytes) -> None:
        if expected is not None and zlib.crc32(data) != expected:
            raise ShardError("crc_mismatch", "")

    return check


class _Set(NamedTuple):
    """Where a set lies, and its number in the ids of its samples where there are several."""

    storage: Storage
    prefix: str

    @property
    def remote(self) -> bool:
        return not isinstance(self.storage, LocalFolder)


class ShardSet:
    """The packed clips of one tier, read member by member.

    Reading is safe from several threads. A copy in another process (pickled) opens its own files.

    Args:
        folders: a folder or URL with `index.json`, such as `shards/video`, or several of one tier.
        cache: where pieces of remote shards are kept; None: nowhere.

    Raises:
        FileNotFoundError: no `index.json` there.
        OSError: it cannot be read.
        ValueError: `index.json` is damaged or of another schema, or the sets do not go together.
    """

    folder: str
    """Where the shards are, for people."""
    tier: str
    audio_codec: str
    video_codec: str | None
    members: tuple[str, ...]
    """Of every sample, as `member_names` says."""
    frame_choice: str
    set_shards: tuple[int, ...]
    """Shards of each set; they are numbered through."""
    sizes: tuple[int, ...]
    """Samples of each shard."""
    ends: tuple[int, ...]
    """Place in packing order after the last sample of each shard."""
    samples: int
    fingerprint: str
    """Changes when the bytes of any shard do."""

    def __init__(
        self, folders: str | Path | Sequence[str | Path], cache: CacheSettings | None = None
    ):
        listed = [folders] if isinstance(folders, str | Path) else list(folders)
        self.folder = ", ".join(map(str, listed))
        sets = [
            _Set(open_storage(folder, cache), f"{number}/" if len(listed) > 1 else "")
            for number, folder in enumerate(listed)
        ]
        indexes = [_read_index(one.storage) for one in sets]
        if not all(index["shards"] for index in indexes):
            raise ValueError(f"{self.folder}: a set without shards")
        self.tier, self.audio_codec, self.video_codec, self.frame_choice = (
            self._common(name, [index[name] for index in indexes])
            for name in ("tier", "audio_codec", "video_codec", "frame_choice")
        )
        self.members = member_names(self.tier, self.audio_codec)
        self.set_shards = tuple(len(index["shards"]) for index in indexes)
        self.sets = tuple(
            one for one, count in zip(sets, self.set_shards, strict=True) for _ in range(count)
        )
        entries = [entry for index in indexes for entry in index["shards"]]
        self.files = tuple(StoredFile(entry.name, entry.sha256, entry.bytes) for entry in entries)
        self.sizes = tuple(entry.samples for entry in entries)
        self.ends = tuple(accumulate(self.sizes))
        self.samples = self.ends[-1]
        digests = "".join(entry.sha256 for entry in entries)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()
        self._start_reading()

    def _common(self, name: str, values: list[Any]) -> Any:
        if len(set(values)) > 1:
            raise ValueError(
                f"{self.folder} do not go together: {name} is {' and '.join(map(str, values))}; "
                f"pack them alike"
            )
        return values[0]

    def _start_reading(self) -> None:
        self._indexes: OrderedDict[int, MemberIndex] = OrderedDict()
        self._lock = threading.Lock()
        self._describe = lru_cache(maxsize=256)(self._read_description)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_reading()

    def weights(self, number: int) -> np.ndarray:
        """Sampling weights of one set, `(samples,)` float32; mapped where the file is local.

        Raises:
            ValueError: the set has none, or they are damaged.
        """
        first = sum(self.set_shards[:number])
        storage = self.sets[first].storage
        place = storage.place("weights.npy")
        try:
            if isinstance(storage, LocalFolder):
                weights = np.load(place, mmap_mode="r", allow_pickle=False)
            else:
                weights = np.load(io.BytesIO(storage.read("weights.npy")), allow_pickle=False)
        except FileNotFoundError as error:
            raise ValueError(
                f"{place} does not exist, and data.sampling is weighted: `cavmae pack` writes it "
                f"where every clip has a label; use uniform, or pack with labels"
            ) from error
        samples = sum(self.sizes[first : first + self.set_shards[number]])
        if weights.shape != (samples,):
            raise ValueError(f"{place} has shape {weights.shape}; the set has {samples} samples")
        return weights

    def at(self, position: int) -> tuple[int, int]:
        """Shard and sample at a place in packing order."""
        shard = bisect_right(self.ends, position)
        return shard, position - self.ends[shard] + self.sizes[shard]

    def place(self, shard: int) -> str:
        """Path or URL of a shard."""
        return self.sets[shard].storage.place(self.files[shard].name)

    def shard_id(self, shard: int) -> str:
        """The part of its samples' ids that they share."""
        return f"{self.sets[shard].prefix}{Path(self.files[shard].name).stem}"

    def sample_id(self, shard: int, sample: int) -> str:
        """A name of the sample that stays the same in all runs, such as `000003/000003017`; with
        the set's number before it where there are several."""
        return f"{self.shard_id(shard)}/{self._index(shard).keys[sample]}"

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
            ShardError: the bytes are damaged, in the shard and not only on their way.
            ValueError: this tier has no such member.
        """
        whole = self._range(shard, sample, extension)
        if extension == "json":
            return self._checked(shard, sample, extension, whole, parse_description)[0]
        expected = self.description(shard, sample)["crc32"].get(extension)
        return self._checked(shard, sample, extension, whole, _has_crc32(expected))[0]

    def member_size(self, shard: int, sample: int, extension: str) -> int:
        """Bytes of a member as the index has it; raises as `member`."""
        return self._range(shard, sample, extension)[1]

    def frame(self, shard: int, sample: int, index: int) -> bytes:
        """A frame of the `video` tier as a video file of its own; only its bytes are read.

        Args:
            index: in presentation order, from 0.

        Raises:
            OSError: the shard cannot be read.
            ShardError: its bytes are damaged, or the video has no such frame.
            ValueError: this tier has no video.
        """
        offset, size = self._range(shard, sample, "mp4")
        fragments = self.description(shard, sample).get("fragments", {})
        place = f"sample {sample} of {self.place(shard)}"
        try:
            sizes, sums = fragments["bytes"], fragments["crc32"]
            if {type(number) for number in (*sizes, *sums)} != {int} or min(sizes) <= 0:
                raise ValueError("not all are whole numbers above 0")
            if sum(sizes) != size:
                raise ValueError(f"{sum(sizes)} bytes of fragments in a video of {size}")
            if not 0 <= index < len(sizes) - 1:
                raise ValueError(f"{len(sizes) - 1} frames, and frame {index} is wanted")
            after = sum(sizes[: index + 1])
            parts = [(0, sizes[0], sums[0]), (after, sizes[index + 1], sums[index + 1])]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            detail = f"fragments of {place}: {type(error).__name__}: {error}"
            raise ShardError("bad_schema", detail) from error
        name = f"frame {index} in mp4"
        return b"".join(
            self._checked(shard, sample, name, (offset + start, length), _has_crc32(crc32))[0]
            for start, length, crc32 in parts
        )

    def _read_description(self, shard: int, sample: int) -> dict[str, Any]:
        whole = self._range(shard, sample, "json")
        return self._checked(shard, sample, "json", whole, parse_description)[1]

    def _checked(
        self,
        shard: int,
        sample: int,
        name: str,
        place: tuple[int, int],
        check: Callable[[bytes], T],
    ) -> tuple[bytes, T]:
        """Bytes at an offset and of a size, and what `check` says of them; read anew where a cache
        may be to blame."""
        file, storage = self.files[shard], self.sets[shard].storage

        def read() -> tuple[bytes, T]:
            data = storage.read_range(file, *place)
            if len(data) != place[1]:
                raise ShardError("short_read", "")
            return data, check(data)

        try:
            try:
                return read()
            except ShardError:
                if not storage.forget(file, *place):
                    raise
            return read()
        except ShardError as error:
            where = f"{name} of sample {sample} of {self.place(shard)}"
            detail = f"{where}: {error.detail}" if error.detail else where
            raise ShardError(error.reason, detail) from error

    def _range(self, shard: int, sample: int, extension: str) -> tuple[int, int]:
        """Offset and size of a member in bytes."""
        index = self._index(shard)
        if extension not in self.members:
            raise ValueError(
                f"a sample of the {self.tier} tier has no {extension!r}; "
                f"it has {', '.join(self.members)}"
            )
        if extension not in index.extensions:
            raise ShardError("missing_member", f"{extension} in {self.place(shard)}")
        column = index.extensions.index(extension)
        return int(index.offset[sample, column]), int(index.size[sample, column])

    def _index(self, shard: int) -> MemberIndex:
        with self._lock:
            index = self._indexes.get(shard)
            if index is None:
                file, storage = self.files[shard], self.sets[shard].storage
                name = f"{Path(file.name).stem}.idx"
                index = parse_member_index(storage.read_beside(name, file), storage.place(name))
                if len(index.offset) != self.sizes[shard]:
                    raise ValueError(
                        f"{self.place(shard)}: its .idx lists {len(index.offset)} samples, "
                        f"index.json {self.sizes[shard]}; pack the videos again"
                    )
                self._indexes[shard] = index
            self._indexes.move_to_end(shard)
            if len(self._indexes) > KEPT_INDEXES:
                self._indexes.popitem(last=False)
            return index
