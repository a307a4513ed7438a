"""The lists of two published sets of sounds: ESC-50's `meta/esc50.csv`, and Speech Commands, whose
folders are its labels and whose text files name what is held out.

Both are cut into parts for training and testing, which must not be mixed.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cavmae.text_table import TextTable, read_text

ESC50_COLUMNS = frozenset({"filename", "fold", "target", "category"})
HELD_OUT = {"validation": "validation_list.txt", "testing": "testing_list.txt"}
"""Parts of Speech Commands, and the lists of their files; all other files are for training."""


class ListedSound(NamedTuple):
    """A file of a published set: its path, its name in the set, its label, and its part."""

    path: Path
    source: str
    label: str
    part: str


def esc50(meta: Path, table: TextTable) -> list[ListedSound]:
    """List ESC-50, whose parts are its folds.

    Args:
        meta: `meta/esc50.csv`; the sounds are in `audio` beside its folder.
        table: its content.
    """
    return [
        ListedSound(
            meta.parent.parent / "audio" / row["filename"],
            row["filename"],
            row["category"],
            row["fold"].strip(),
        )
        for _, row in table.rows
    ]


def is_speech_commands(folder: Path) -> bool:
    """Whether a folder has both lists of Speech Commands."""
    return all((folder / name).is_file() for name in HELD_OUT.values())


def speech_commands(folder: Path) -> list[ListedSound]:
    """List Speech Commands, sorted by path; `_background_noise_`, which is no word, is left out.

    Raises:
        OSError: a list or a folder can't be read.
        ValueError: a list is no text.
    """
    part_of = {
        name.strip(): part
        for part, file in HELD_OUT.items()
        for name in read_text(folder / file).splitlines()
        if name.strip()
    }
    found = {path.relative_to(folder).as_posix() for path in folder.glob("[!_.]*/*.wav")}
    return [
        ListedSound(
            folder / name, name, PurePosixPath(name).parent.name, part_of.get(name, "training")
        )
        for name in sorted(found | part_of.keys())
    ]


def of_parts(sounds: Iterable[ListedSound], split: str, videos: Path) -> list[ListedSound]:
    """Choose the sounds of some parts.

    Args:
        sounds: of the set.
        split: the parts, separated by commas; empty: all.
        videos: the list, for the error.

    Raises:
        ValueError: there is no such part.
    """
    sounds = list(sounds)
    parts = {sound.part for sound in sounds}
    wanted = {part.strip() for part in split.split(",")} if split else parts
    if unknown := sorted(wanted - parts):
        raise ValueError(
            f"split has {unknown[0]!r}, which is no part of {videos}; it has "
            f"{', '.join(sorted(parts))}"
        )
    return [sound for sound in sounds if sound.part in wanted]
