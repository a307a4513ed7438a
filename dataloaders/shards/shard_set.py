"""Packed clips: WebDataset tars with an index beside each, written whole or not at all.

A tier is a folder of `NNNNNN.tar` (samples), `NNNNNN.idx` (byte offsets, in the text format of
DALI's `wds2idx`, v1.2) and one `index.json`, which is written last: a folder that has it is
complete. Training reads single members by offset, never whole tars, so any order of samples costs
only the bytes of the members it uses. Members are addressed by a list of known extensions and
returned as bytes: nothing in a shard can make the reader run code or leave the folder.

Several sets of one tier are read as one, with consecutively numbered shards.
"""

import hashlib
import io
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cavmae.dataloaders.config import CacheSettings
from cavmae.dataloaders.constants import TIERS, Modalities
from cavmae.dataloaders.shards.format import (
    CONTENT_FILE,
    MemberIndex,
    ShardError,
    member_names,
    parse_description,
    parse_index,
    parse_member_index,
)
from cavmae.dataloaders.shards.storage import LocalFolder, Storage, StoredFile, open_storage

T = TypeVar("T")

CACHED_INDEXES = 384
"""Shards whose index a `ShardSet` keeps in memory; 64 lanes with a window of 4,096 samples use
about 320 at once."""


def looks_packed(folder: Path) -> bool:
    """Whether a folder is a packed tier, or has one in it."""
    return any((folder / name / "index.json").is_file() for name in (".", *TIERS))


def read_index(storage: Storage) -> dict[str, Any]:
    """Read and check the `index.json` of one tier.

    Raises:
        FileNotFoundError: the folder has no `index.json`.
        OSError: the file cannot be read.
        ValueError: the index is damaged or has another schema.
    """
    location = storage.location("index.json")
    try:
        data = storage.read("index.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        folder = Path(location).parent
        tiers = [tier for tier in TIERS if (folder / tier / "index.json").is_file()]
        if tiers:
            raise FileNotFoundError(
                f"{folder} holds several tiers; use {folder / tiers[0]}"
            ) from error
        raise FileNotFoundError(
            f"{location} does not exist: not a folder of packed shards, or packing was not "
            f"finished (run `cavmae pack` on it again)"
        ) from error
    return parse_index(data, location)


def _intact(crc32: int | None, data: bytes) -> bytes:
    """Check bytes against a CRC-32; None: the sample's JSON has none."""
    if crc32 is not None and zlib.crc32(data) != crc32:
        raise ShardError("crc_mismatch", "")
    return data


class ShardSet:
    """Reads the packed clips of one tier, member by member.

    Reading is thread-safe. A pickled copy in another process opens its own files.

    Args:
        folders: a folder or URL with `index.json`, such as `shards/video`, or several of one tier.
        cache: where remote shards are cached; None: nowhere.

    Attributes:
        folder: folders or URLs of the sets, for messages.
        tier, modality, audio_codec, video_codec, frame_choice: of all sets, as packed.
        members: extensions of every sample's members (see `member_names`).
        storages: storage of each set.
        content_sha256: digest of each set's `content.npy`.
        set_shards: number of shards of each set.
        set_of: number of each shard's set.
        files: each shard as a file.
        sizes: number of samples of each shard.
        ends: position in packing order after the last sample of each shard.
        samples: number of samples of all sets.
        fingerprint: changes when the bytes of any shard do.

    Raises:
        FileNotFoundError: there is no `index.json`.
        OSError: `index.json` cannot be read.
        ValueError: `index.json` is damaged or has another schema, or the sets do not match.
    """

    def __init__(
        self, folders: str | Path | Sequence[str | Path], cache: CacheSettings | None = None
    ):
        listed = [folders] if isinstance(folders, str | Path) else list(folders)
        self.folder = ", ".join(map(str, listed))
        self.storages = [open_storage(folder, cache) for folder in listed]
        try:
            indexes = [read_index(storage) for storage in self.storages]
        except FileNotFoundError as error:
            if len(listed) == 1:
                raise
            raise FileNotFoundError(f"{error}; commas separate sets, here {listed}") from error
        if not all(index["shards"] for index in indexes):
            raise ValueError(f"{self.folder}: a set without shards")
        self.tier: str = self._common("tier", indexes)
        self.modality: Modalities = self._common("modality", indexes)
        self.audio_codec: str = self._common("audio_codec", indexes)
        self.video_codec: str | None = self._common("video_codec", indexes)
        self.frame_choice: str = self._common("frame_choice", indexes)
        self.members = member_names(self.tier, self.audio_codec, self.modality)
        self.content_sha256 = tuple(index["content_sha256"] for index in indexes)
        self.set_shards = tuple(len(index["shards"]) for index in indexes)
        self.set_of = [number for number, index in enumerate(indexes) for _ in index["shards"]]
        entries = [entry for index in indexes for entry in index["shards"]]
        self.files = tuple(StoredFile(entry.name, entry.sha256, entry.bytes) for entry in entries)
        self.sizes = tuple(entry.samples for entry in entries)
        self.ends = tuple(accumulate(self.sizes))
        self.samples = self.ends[-1]
        digests = "".join(entry.sha256 for entry in entries)
        self.fingerprint = hashlib.sha256(digests.encode()).hexdigest()
        self._start_reading()

    def _common(self, name: str, indexes: list[dict[str, Any]]) -> Any:
        values = [index[name] for index in indexes]
        if len(set(values)) > 1:
            raise ValueError(
                f"{self.folder} cannot be read as one set: {name} is "
                f"{' and '.join(map(str, values))}; pack them with the same {name}"
            )
        return values[0]

    def check_has(self, modality: Modalities, otherwise: str = "") -> None:
        """Check that the set has what is to be read of it.

        Args:
            modality: what is.
            otherwise: what to do but give another set, such as a field to change.

        Raises:
            ValueError: it does not; names the set, what it lacks and the fix.
        """
        if self.modality in ("both", modality):
            return
        lacks = "pictures" if self.modality == "audio" else "sound"
        raise ValueError(
            f"{self.folder} has no {lacks}: it was packed with --modality {self.modality}; give a "
            f"set with {lacks}{otherwise and f', or {otherwise}'}"
        )

    def _start_reading(self) -> None:
        self._index = lru_cache(CACHED_INDEXES)(self._read_index)
        self._described = lru_cache(maxsize=256)(self._read_description)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start_reading()

    def weights(self, number: int) -> np.ndarray:
        """Sampling weights of one set, `(samples,)` float32; memory-mapped if the file is local.

        Raises:
            ValueError: the set has no weights, or they are damaged.
        """
        storage = self.storages[number]
        location = storage.location("weights.npy")
        try:
            if isinstance(storage, LocalFolder):
                weights = np.load(location, mmap_mode="r", allow_pickle=False)
            else:
                weights = np.load(io.BytesIO(storage.read("weights.npy")), allow_pickle=False)
        except FileNotFoundError as error:
            raise ValueError(
                f"{location} does not exist, and data.sampling is weighted: `cavmae pack` writes "
                f"it where every clip has a label; use uniform, or pack with labels"
            ) from error
        first = sum(self.set_shards[:number])
        samples = sum(self.sizes[first : first + self.set_shards[number]])
        if weights.shape != (samples,):
            raise ValueError(f"{location} has shape {weights.shape}; the set has {samples} samples")
        return weights

    def content(self) -> np.ndarray | None:
        """What each clip is, whatever its name, tier, codec and size: `(samples,)` uint64, the
        first 8 bytes of `DecodedClip.content`; None: unknown, as a set has no `content.npy`.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not the one that was packed with its set.
        """
        parts = []
        for storage, sha256 in zip(self.storages, self.content_sha256, strict=True):
            try:
                data = storage.read(CONTENT_FILE)
            except FileNotFoundError:
                return None
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError(
                    f"{storage.location(CONTENT_FILE)} is not the one that was packed with its "
                    "set; copy the whole tier again"
                )
            parts.append(np.load(io.BytesIO(data), allow_pickle=False))
        return np.concatenate(parts)

    def at(self, position: int) -> tuple[int, int]:
        """Shard and sample at a position in packing order."""
        shard = bisect_right(self.ends, position)
        return shard, position - self.ends[shard] + self.sizes[shard]

    def location(self, shard: int) -> str:
        """Path or URL of a shard."""
        return self.storages[self.set_of[shard]].location(self.files[shard].name)

    def shard_id(self, shard: int) -> str:
        """The prefix that the ids of a shard's samples share."""
        prefix = f"{self.set_of[shard]}/" if len(self.storages) > 1 else ""
        return f"{prefix}{Path(self.files[shard].name).stem}"

    def sample_id(self, shard: int, sample: int) -> str:
        """A name of the sample that is stable across runs, such as `000003/000003017`; prefixed
        with the set's number if there are several sets."""
        return f"{self.shard_id(shard)}/{self._index(shard).keys[sample]}"

    def description(self, shard: int, sample: int) -> dict[str, Any]:
        """The sample's parsed JSON. It is shared between calls: do not modify it.

        Raises:
            OSError: the shard cannot be read.
            ShardError: the JSON is damaged.
        """
        return self._described(shard, sample)[1]

    def member(self, shard: int, sample: int, extension: str) -> bytes:
        """Bytes of one member, checked against the CRC-32 in the sample's JSON.

        Raises:
            OSError: the shard cannot be read.
            ShardError: the bytes are damaged in the shard, not just in transfer.
            ValueError: this tier has no such member.
        """
        span = self._range(shard, sample, extension)
        data, description = self._described(shard, sample)
        if extension == "json":
            return data
        intact = partial(_intact, description["crc32"].get(extension))
        return self._checked(shard, sample, extension, span, intact)

    def member_size(self, shard: int, sample: int, extension: str) -> int:
        """Size of a member in bytes, from the index; raises like `member`."""
        return self._range(shard, sample, extension)[1]

    def frame(self, shard: int, sample: int, index: int) -> bytes:
        """A frame of the `video` tier as a one-frame video file; only its bytes are read.

        Args:
            index: in presentation order, from 0.

        Raises:
            OSError: the shard cannot be read.
            ShardError: the frame's bytes are damaged, or the video has no such frame.
            ValueError: this tier has no video.
        """
        offset, size = self._range(shard, sample, "mp4")
        fragments = self.description(shard, sample).get("fragments", {})
        try:
            sizes, sums = fragments["bytes"], fragments["crc32"]
            if {type(number) for number in (*sizes, *sums)} != {int} or min(sizes) <= 0:
                raise ValueError("not all are whole numbers above 0")
            if sum(sizes) != size:
                raise ValueError(f"{sum(sizes)} bytes of fragments in a video of {size}")
            if not 0 <= index < len(sizes) - 1:
                raise ValueError(f"frame {index} of {len(sizes) - 1}")
            after = sum(sizes[: index + 1])
            parts = [(0, sizes[0], sums[0]), (after, sizes[index + 1], sums[index + 1])]
        except (TypeError, KeyError, IndexError, ValueError) as error:
            location = f"sample {sample} of {self.location(shard)}"
            detail = f"fragments of {location}: {type(error).__name__}: {error}"
            raise ShardError("bad_schema", detail) from error
        name = f"frame {index} in mp4"
        return b"".join(
            self._checked(shard, sample, name, (offset + start, length), partial(_intact, crc32))
            for start, length, crc32 in parts
        )

    def _read_description(self, shard: int, sample: int) -> tuple[bytes, dict[str, Any]]:
        def parse(data: bytes) -> tuple[bytes, dict[str, Any]]:
            return data, parse_description(data)

        return self._checked(shard, sample, "json", self._range(shard, sample, "json"), parse)

    def _checked(
        self,
        shard: int,
        sample: int,
        name: str,
        span: tuple[int, int],
        parse: Callable[[bytes], T],
    ) -> T:
        """What `parse` makes of the bytes at an offset and of a size; a bad cache entry is dropped
        and read again."""
        file, storage = self.files[shard], self.storages[self.set_of[shard]]

        def read() -> T:
            data = storage.read_range(file, *span)
            if len(data) != span[1]:
                raise ShardError("short_read", "")
            return parse(data)

        try:
            try:
                return read()
            except ShardError:
                if not storage.forget(file, *span):
                    raise
            return read()
        except ShardError as error:
            where = f"{name} of sample {sample} of {self.location(shard)}"
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
            raise ShardError("missing_member", f"{extension} in {self.location(shard)}")
        column = index.extensions.index(extension)
        return int(index.offset[sample, column]), int(index.size[sample, column])

    def _read_index(self, shard: int) -> MemberIndex:
        file, storage = self.files[shard], self.storages[self.set_of[shard]]
        name = f"{Path(file.name).stem}.idx"
        index = parse_member_index(storage.read_sidecar(name, file), storage.location(name))
        if len(index.offset) != self.sizes[shard]:
            raise ValueError(
                f"{self.location(shard)}: its .idx lists {len(index.offset)} samples, "
                f"index.json {self.sizes[shard]}; pack the videos again with `cavmae pack`"
            )
        return index
