"""What weights were trained on: the fingerprints of the sets, and the content of their clips.

`trained_on.npz` lies beside the weights of every run and export. Leakage is judged by it alone: a
path says nothing of what lay there when the run began, and the sets may be gone by then.
"""

import dataclasses
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from cavmae.atomic_write import atomic_write
from cavmae.dataloaders.config import CacheSettings
from cavmae.dataloaders.constants import Modalities
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.configs import RunConfig

FILE = "trained_on.npz"
_WEIGHTS = ("weights.pt", "published.pth")
"""Files that runs and exports write; another one in their folder came from elsewhere."""


@dataclass(frozen=True)
class TrainedSet:
    """A packed set. Attributes: name, the last two parts of its path; clips; fingerprint, of its
    shards; modality, what it has."""

    name: str
    clips: int
    fingerprint: str
    modality: Modalities = "both"


@dataclass(frozen=True)
class TrainedOn:
    """What weights were trained on.

    Attributes:
        sets: of the run and of what it started from.
        unknown: sets without content hashes, and weights whose training is not known.
        content: `(clips,)` uint64, ascending, each once: `ShardSet.content` of the sets.
    """

    sets: tuple[TrainedSet, ...]
    unknown: tuple[str, ...]
    content: np.ndarray

    @classmethod
    def of_sets(cls, folders: Sequence[str], cache: CacheSettings | None) -> Self:
        """Read the fingerprints and content hashes of packed sets.

        Raises:
            OSError, ValueError: a set can't be read.
        """
        sets = {folder: ShardSet(folder, cache) for folder in folders}
        content = {folder: one.content() for folder, one in sets.items()}
        return cls(
            tuple(
                TrainedSet(set_name(folder), one.samples, one.fingerprint, one.modality)
                for folder, one in sets.items()
            ),
            tuple(set_name(folder) for folder, hashes in content.items() if hashes is None),
            _union(hashes for hashes in content.values() if hashes is not None),
        )

    @classmethod
    def beside(cls, place: str | Path) -> Self:
        """Read what the weights of a run or export, given by folder or file, were trained on; it is
        unknown where there is no `trained_on.npz`.

        Raises:
            OSError, ValueError: the file can't be read.
        """
        place = Path(place)
        folders = [one.parent for one in (place, place.resolve()) if one.name in _WEIGHTS]
        files = [folder / FILE for folder in ([place] if place.is_dir() else folders)]
        path = next((one for one in files if one.is_file()), None)
        if path is None:
            return cls((), (set_name(place.absolute()),), _union([]))
        try:
            with np.load(path, allow_pickle=False) as file:
                document, content = json.loads(str(file["sets"])), file["content"]
            sets = tuple(TrainedSet(**one) for one in document["sets"])
            return cls(sets, tuple(document["unknown"]), content)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is damaged ({error}); copy it again from where the weights came from, or "
                "remove it, and what they were trained on is unknown"
            ) from error

    def joined(self, other: "TrainedOn") -> "TrainedOn":
        """Return what both were trained on."""
        return TrainedOn(
            tuple(dict.fromkeys(self.sets + other.sets)),
            tuple(dict.fromkeys(self.unknown + other.unknown)),
            _union([self.content, other.content]),
        )

    def save(self, folder: Path) -> None:
        """Write `trained_on.npz`."""
        sets = [dataclasses.asdict(one) for one in self.sets]
        text = json.dumps({"sets": sets, "unknown": self.unknown})
        with atomic_write(folder / FILE) as temporary, temporary.open("wb") as file:
            np.savez(file, sets=np.array(text), content=self.content)

    def leakage(self, modality: Modalities) -> str:
        """The `leakage` of a result that shares no known clip with the training.

        Args:
            modality: of the set that was scored. The content of a clip is that of all that was
                packed of it, so clips of a set with anything else are not known to be others.
        """
        other = [one.name for one in self.sets if one.modality != modality]
        unknown = [*self.unknown, *other]
        if not unknown:
            return "none"
        known = "; none in trained_on" if len(other) < len(self.sets) else ""
        return f"unknown of {', '.join(unknown)}{known}"


def training_of(config: RunConfig) -> TrainedOn:
    """Read what the weights of a run that begins will have been trained on: its sets, and those of
    its initial weights.

    Raises:
        OSError, ValueError: a set or a file can't be read.
    """
    own = TrainedOn.of_sets(config.data.train_folders, config.data.cache)
    start = config.initial_weights
    return own.joined(TrainedOn.beside(start)) if start else own


def set_name(place: str | Path) -> str:
    """Return the last two parts of a path or URL, which name a set; the others name a machine."""
    return "/".join(Path(place).parts[-2:])


def _union(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
