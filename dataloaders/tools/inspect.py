"""`cavmae inspect`: shows packed clips before a run.

Prints statistics of a set, and writes a contact sheet of randomly drawn clips: the frame and the
spectrogram that a model gets, with label and key. Works on a folder and on a URL.
"""

import base64
import html
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.table import Table

from cavmae.atomic_write import atomic_write
from cavmae.console import plain_console
from cavmae.dataloaders.constants import MIDDLE_FRAME
from cavmae.dataloaders.packing.statistics import read_statistics
from cavmae.dataloaders.sampling.philox import random_permutation
from cavmae.dataloaders.shards.format import clip_seconds
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import LocalFolder
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.text_table import in_utf8

LARGEST_SURVEY = 2000
"""Maximum number of clips for the tables; larger sets are sampled."""
HISTOGRAM_ROWS = 8
ROWS_SHOWN = 20
AUDIO_FRAMES, MEL_BINS = 1024, 128


@dataclass(frozen=True)
class InspectConfig(CheckedFields):
    """Print statistics of packed shards and write a contact sheet of clips.

    Raises:
        ValueError: a field is out of range.
    """

    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """One tier of packed shards, such as `shards/video`; a folder or a URL."""
    out: str = "inspect.html"
    """Contact sheet: a self-contained page (.html) or an image (.png)."""
    clips: PositiveInt = 16
    """Number of clips on the sheet."""
    seed: int = 0
    """Seed of the random choice of clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix not in (".html", ".png"):
            raise ValueError(f"out is {self.out!r}; use a .html or .png file")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(InspectConfig, prog="cavmae inspect", args=argv)
    shards = ShardSet(config.shards)
    for table in survey(shards, config.seed):
        plain_console().print(table)
    cards = draw(shards, config.clips, config.seed)
    write_sheet(Path(config.out), config.shards, cards)
    plain_console().print(f"{len(cards)} clips: {config.out}")
    return 0


def _drawn(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """Shard and sample of randomly drawn clips, in the set's order."""
    chosen = np.sort(random_permutation(seed, "order", 0, shards.samples)[:count])
    return [shards.at(position) for position in chosen.tolist()]


# ---------------------------------------------------------------------------------- numbers


def survey(shards: ShardSet, seed: int) -> list[Table]:
    """Make tables of a set's statistics.

    Raises:
        OSError: a shard cannot be read.
        ShardError: a sample's JSON is damaged.
    """
    places = _drawn(shards, LARGEST_SURVEY, seed)
    found = [shards.description(*place) for place in places]
    table = Table(title=shards.folder, show_header=False)
    table.add_row("tier", shards.tier)
    table.add_row("clips", f"{shards.samples} in {len(shards.sizes)} shards")
    size = sum(file.bytes for file in shards.files)
    table.add_row("bytes", f"{size / 1e9:.2f} GB, {size / shards.samples / 1e3:.0f} kB a clip")
    if len(found) < shards.samples:
        table.add_row("sampled", f"{len(found)} clips")
    kind = "video" if shards.modality == "video" else "audio"
    seconds = np.array([clip_seconds(one) for one in found])
    table.add_row(kind, f"{seconds.mean() * shards.samples / 3600:.1f} h, {_spread(seconds)}")
    codecs = []
    if shards.modality != "audio":
        frames = np.array([one["video"]["frames"] for one in found])
        table.add_row("frames", _spread(frames))
        sizes = Counter(f"{one['video']['width']} x {one['video']['height']}" for one in found)
        table.add_row("frame sizes", _most_common(sizes, 5))
        codecs.append(shards.video_codec or "JPEG")
    if shards.modality != "video":
        codecs.append(f"{shards.audio_codec} audio")
    table.add_row("codec", ", ".join(codecs))
    tables = [table, _histogram(seconds, kind)]
    labels = Counter(label for one in found for label in one["labels"])
    tables += _counts("label", f"{len(labels)} labels", labels)
    return tables + _counts("reason", "not packed", _skipped(shards))


def _counts(column: str, title: str, counts: Counter[str]) -> list[Table]:
    """A table of the most common values, if there are any."""
    table = Table(column, "clips", title=title)
    for value, count in counts.most_common(ROWS_SHOWN):
        table.add_row(value, str(count))
    return [table] if counts else []


def _spread(values: np.ndarray) -> str:
    return f"{values.min():g} to {values.max():g}, median {np.median(values):g}"


def _most_common(counts: Counter[str], count: int) -> str:
    shown = ", ".join(f"{name} ({number})" for name, number in counts.most_common(count))
    return shown + (f", {len(counts) - count} more" if len(counts) > count else "")


def _histogram(seconds: np.ndarray, kind: str) -> Table:
    counts, edges = np.histogram(seconds, HISTOGRAM_ROWS)
    table = Table("seconds", "clips", "", title=f"length of the {kind}")
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        table.add_row(f"{low:.1f} to {high:.1f}", str(count), "#" * round(40 * count / max(counts)))
    return table


def _skipped(shards: ShardSet) -> Counter[str]:
    """Reasons in the `report.jsonl` beside local tiers."""
    found: Counter[str] = Counter()
    for storage in shards.storages:
        if isinstance(storage, LocalFolder) and read_statistics(storage.folder):
            report = storage.folder.resolve().parent / "report.jsonl"
            lines = report.read_text().splitlines()
            found.update(json.loads(line)["reason"] for line in lines)
    return found


# ------------------------------------------------------------------------------------ sheet


@dataclass(frozen=True)
class Card:
    """A clip on the contact sheet.

    Attributes:
        sample_id, labels, facts: caption.
        frame: `(height, width, 3)` uint8; None: the set has no pictures.
        log_mel: `(frames, bins)` float32, not normalised; None: it has no sound.
    """

    sample_id: str
    labels: tuple[str, ...]
    facts: str
    frame: np.ndarray | None
    log_mel: np.ndarray | None


def draw(shards: ShardSet, count: int, seed: int) -> list[Card]:
    """Make cards of randomly drawn clips; raises like `card_of`."""
    return [card_of(shards, *place) for place in _drawn(shards, count, seed)]


def card_of(shards: ShardSet, shard: int, sample: int) -> Card:
    """Make the card of a clip, with its middle frame.

    Raises:
        OSError: the shard cannot be read.
        ShardError: the clip is damaged.
        ValueError: the clip does not decode.
    """
    import torch
    from av.error import FFmpegError

    from cavmae.dataloaders.media.audio_codec import decode_audio
    from cavmae.dataloaders.media.decode_frame import FrameError
    from cavmae.dataloaders.media.log_mel import log_mel

    described = shards.description(shard, sample)
    sample_id = shards.sample_id(shard, sample)
    source = described["source"]
    facts = f"{source['path']} from {source['start_seconds']:g} s"
    spectrogram = pixels = None
    try:
        if "audio" in described:
            audio = shards.member(shard, sample, shards.audio_codec)
            waveform = torch.from_numpy(decode_audio(audio))
            heard = log_mel([waveform], MEL_BINS, AUDIO_FRAMES, torch.device("cpu"))
            spectrogram = heard[0].numpy()
            facts += f", {clip_seconds(described):.1f} s of audio"
        if "video" in described:
            pixels = frame_pixels(shards, shard, sample, MIDDLE_FRAME)
            shown = described["ten_frames"][MIDDLE_FRAME]["seconds"]
            facts += f", {described['video']['frames']} frames, the one at {shown:.2f} s"
    except (FFmpegError, FrameError, OSError) as error:
        raise ValueError(f"{sample_id} of {shards.folder} does not decode: {error}") from error
    return Card(sample_id, tuple(described["labels"]), facts, pixels, spectrogram)


def frame_pixels(shards: ShardSet, shard: int, sample: int, number: int) -> np.ndarray:
    """Decode one of the ten frames of a clip: `(height, width, 3)` uint8.

    Raises:
        OSError: the shard cannot be read.
        ShardError: the clip is damaged.
        FrameError: the frame does not decode.
    """
    from PIL import Image

    from cavmae.dataloaders.media.decode_frame import decode_frame, decode_original

    described = shards.description(shard, sample)
    frame = described["ten_frames"][number]
    if shards.tier == "video":
        return decode_frame(shards.frame(shard, sample, frame["index"]))
    if shards.tier == "original":
        video = described["video"]
        source = shards.member(shard, sample, "source")
        return decode_original(source, frame["seconds"], video["width"], video["height"])
    jpeg = shards.member(shard, sample, f"{number}.jpg")
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def write_sheet(path: Path, title: str, cards: list[Card]) -> None:
    """Write a contact sheet, as a page (.html) or an image.

    Raises:
        OSError: the file can't be written.
    """
    write = _write_page if path.suffix == ".html" else _write_image
    with atomic_write(path) as temporary:
        write(temporary, in_utf8(title), cards)


def _write_page(path: Path, title: str, cards: list[Card]) -> None:
    rows = "".join(
        f"<figure>{_image(card.frame, 'frame')}"
        f"{_image(None if card.log_mel is None else card.log_mel.T[::-1], 'log-mel')}"
        f"<figcaption><b>{html.escape(card.sample_id)}</b> "
        f"{html.escape(', '.join(card.labels) or 'no label')}<br>{html.escape(card.facts)}"
        f"</figcaption></figure>"
        for card in cards
    )
    style = (
        "body{font:14px sans-serif;margin:2em}figure{display:inline-block;width:640px;margin:8px}"
        "img{height:200px;margin-right:4px;max-width:420px}figcaption{color:#333}"
    )
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{style}</style><h1>{html.escape(title)}</h1>{rows}\n",
        encoding="utf-8",
    )


def _image(pixels: np.ndarray | None, alt: str) -> str:
    if pixels is None:
        return ""
    return f"<img src='data:image/jpeg;base64,{_jpeg(pixels)}' alt='{alt}'>"


def _write_image(path: Path, title: str, cards: list[Card]) -> None:
    from matplotlib.figure import Figure

    columns = min(4, len(cards))
    rows = -(-len(cards) // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for number, card in enumerate(cards):
        row, column = divmod(number, columns)
        above, below = axes[2 * row][column], axes[2 * row + 1][column]
        if card.frame is not None:
            above.imshow(card.frame)
        above.set_title(
            f"{card.sample_id}\n{', '.join(card.labels) or 'no label'}",
            fontsize=8,
            parse_math=False,
        )
        if card.log_mel is not None:
            below.imshow(card.log_mel.T, origin="lower", aspect="auto")
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, format="png", dpi=80)


def _jpeg(pixels: np.ndarray) -> str:
    """Encode RGB pixels, or one value per pixel in colours from the lowest to the highest."""
    from matplotlib.image import imsave

    encoded = io.BytesIO()
    imsave(encoded, pixels, format="jpeg", pil_kwargs={"quality": 85})
    return base64.b64encode(encoded.getvalue()).decode()
