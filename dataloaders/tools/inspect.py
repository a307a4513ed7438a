"""`cavmae inspect`: shows packed clips before a run.

Prints statistics of a set, and writes a contact sheet of randomly drawn clips: the frame and the
spectrogram that a model gets, with label and key. Works on a folder and on a URL.
"""

import io
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cavmae.atomic_write import atomic_write
from cavmae.console import JsonOption, print_json, print_rows
from cavmae.dataloaders.constants import MIDDLE_FRAME, Modalities
from cavmae.dataloaders.packing.statistics import read_statistics
from cavmae.dataloaders.sampling.philox import random_permutation
from cavmae.dataloaders.shards.format import clip_seconds
from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.dataloaders.shards.storage import LocalFolder
from cavmae.field_checks import CheckedFields, PositiveInt
from cavmae.html_page import element, page, picture
from cavmae.text_table import in_utf8

LARGEST_SURVEY = 2000
"""Maximum number of clips for the tables; larger sets are sampled."""
HISTOGRAM_ROWS = 8
ROWS_SHOWN = 20
AUDIO_FRAMES, MEL_BINS = 1024, 128


@dataclass(frozen=True)
class InspectConfig(CheckedFields, JsonOption):
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
    found = survey(shards, config.seed)
    cards = draw(shards, config.clips, config.seed)
    write_sheet(Path(config.out), config.shards, cards)
    if config.json:
        print_json(asdict(found))
    else:
        show(found)
    print(f"{len(cards)} clips: {config.out}", file=sys.stderr)
    return 0


def _drawn(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """Shard and sample of randomly drawn clips, in the set's order."""
    chosen = np.sort(random_permutation(seed, "order", 0, shards.samples)[:count])
    return [shards.at(position) for position in chosen.tolist()]


# ---------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Survey:
    """What a set holds.

    Attributes:
        folder, tier, clips, shards, bytes: of the set.
        sampled: clips that the rest is of.
        modality: what its clips have.
        hours: of the whole set's sound, or pictures where it has none, from the sampled ones.
        seconds, frames: least, median and largest of a clip; None: it has no pictures.
        video_codec, audio_codec: of all clips; empty: there is none.
        frame_sizes: clips by width and height, the most common first.
        lengths: from, to and clips of each bar of a histogram of the seconds.
        labels: clips by label, the most common first.
        not_packed: clips by reason.
    """

    folder: str
    tier: str
    modality: Modalities
    clips: int
    shards: int
    bytes: int
    sampled: int
    hours: float
    seconds: tuple[float, float, float]
    frames: tuple[float, float, float] | None
    video_codec: str
    audio_codec: str
    frame_sizes: dict[str, int]
    lengths: list[tuple[float, float, int]]
    labels: dict[str, int]
    not_packed: dict[str, int]


def survey(shards: ShardSet, seed: int) -> Survey:
    """Collect a set's statistics.

    Raises:
        OSError: a shard cannot be read.
        ShardError: a sample's JSON is damaged.
    """
    places = _drawn(shards, LARGEST_SURVEY, seed)
    found = [shards.description(*place) for place in places]
    seconds = np.array([clip_seconds(one) for one in found])
    counts, edges = np.histogram(seconds, HISTOGRAM_ROWS)
    bounds = edges.tolist()
    pictures = [one["video"] for one in found if "video" in one]
    sizes = Counter(f"{one['width']} x {one['height']}" for one in pictures)
    return Survey(
        folder=shards.folder,
        tier=shards.tier,
        modality=shards.modality,
        clips=shards.samples,
        shards=len(shards.sizes),
        bytes=sum(file.bytes for file in shards.files),
        sampled=len(found),
        hours=float(seconds.mean()) * shards.samples / 3600,
        seconds=_spread(seconds),
        frames=_spread(np.array([one["frames"] for one in pictures])) if pictures else None,
        video_codec=(shards.video_codec or "JPEG") if pictures else "",
        audio_codec="" if shards.modality == "video" else shards.audio_codec,
        frame_sizes=dict(sizes.most_common()),
        lengths=list(zip(bounds[:-1], bounds[1:], counts.tolist(), strict=True)),
        labels=dict(Counter(label for one in found for label in one["labels"]).most_common()),
        not_packed=dict(_skipped(shards).most_common()),
    )


def show(found: Survey) -> None:
    """Print a survey as tables."""
    size = f"{found.bytes / 1e9:.2f} GB, {found.bytes / found.clips / 1e3:.0f} kB a clip"
    kind = "video" if found.modality == "video" else "audio"
    sound = f"{found.audio_codec} audio" if found.audio_codec else ""
    rows = [
        ("tier", found.tier),
        ("clips", f"{found.clips} in {found.shards} shards"),
        ("bytes", size),
        ("sampled", f"{found.sampled} clips"),
        (kind, f"{found.hours:.1f} h, {_range(found.seconds)}"),
        ("codec", ", ".join(filter(None, (found.video_codec, sound)))),
    ]
    if found.frames:
        rows.append(("frames", _range(found.frames)))
        rows.append(("frame sizes", _most_common(found.frame_sizes, 5)))
    print_rows(("", ""), rows, title=found.folder)
    most = max(count for _, _, count in found.lengths)
    bars = [
        (f"{low:.1f} to {high:.1f}", count, "#" * round(40 * count / most))
        for low, high, count in found.lengths
    ]
    print_rows(("seconds", "clips", ""), bars, title=f"length of the {kind}")
    for column, title, counts in (
        ("label", f"{len(found.labels)} labels", found.labels),
        ("reason", "not packed", found.not_packed),
    ):
        if counts:
            print_rows((column, "clips"), list(counts.items())[:ROWS_SHOWN], title=title)


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.min()), float(np.median(values)), float(values.max())


def _range(spread: tuple[float, float, float]) -> str:
    return f"{spread[0]:g} to {spread[2]:g}, median {spread[1]:g}"


def _most_common(counts: dict[str, int], count: int) -> str:
    shown = ", ".join(f"{name} ({number})" for name, number in list(counts.items())[:count])
    return shown + (f", {len(counts) - count} more" if len(counts) > count else "")


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
    from cavmae.dataloaders.media.headers import HeaderError, check_audio
    from cavmae.dataloaders.media.log_mel import log_mel

    described = shards.description(shard, sample)
    sample_id = shards.sample_id(shard, sample)
    source = described["source"]
    facts = f"{source['path']} from {source['start_seconds']:g} s"
    spectrogram = pixels = None
    try:
        if "audio" in described:
            audio = shards.member(shard, sample, shards.audio_codec)
            check_audio(audio, shards.audio_codec, described["audio"]["samples"])
            waveform = torch.from_numpy(decode_audio(audio))
            heard = log_mel([waveform], MEL_BINS, AUDIO_FRAMES, torch.device("cpu"))
            spectrogram = heard[0].numpy()
            facts += f", {clip_seconds(described):.1f} s of audio"
        if "video" in described:
            pixels = frame_pixels(shards, shard, sample, MIDDLE_FRAME)
            shown = described["ten_frames"][MIDDLE_FRAME]["seconds"]
            facts += f", {described['video']['frames']} frames, the one at {shown:.2f} s"
    except (FFmpegError, FrameError, HeaderError, OSError) as error:
        raise ValueError(f"{sample_id} of {shards.folder} does not decode: {error}") from error
    return Card(sample_id, tuple(described["labels"]), facts, pixels, spectrogram)


def frame_pixels(shards: ShardSet, shard: int, sample: int, number: int) -> np.ndarray:
    """Decode one of the ten frames of a clip: `(height, width, 3)` uint8.

    Raises:
        OSError: the shard cannot be read.
        ShardError: the clip is damaged.
        FrameError: the frame does not decode.
        HeaderError: the frame states another size than the sample's JSON.
    """
    from PIL import Image

    from cavmae.dataloaders.media.decode_frame import decode_frame, decode_original
    from cavmae.dataloaders.media.headers import check_jpeg

    described = shards.description(shard, sample)
    frame, video = described["ten_frames"][number], described["video"]
    size = video["width"], video["height"]
    if shards.tier == "video":
        return decode_frame(shards.frame(shard, sample, frame["index"]), *size)
    if shards.tier == "original":
        source = shards.member(shard, sample, "source")
        return decode_original(source, frame["seconds"], *size)
    jpeg = shards.member(shard, sample, f"{number}.jpg")
    check_jpeg(jpeg, *size)
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
    figures = "".join(
        f"<figure>{_jpeg(card.frame, 'frame')} "
        f"{_jpeg(None if card.log_mel is None else card.log_mel.T[::-1], 'log-mel')}"
        f"<figcaption>{element('b', card.sample_id)} "
        f"{element('span', ', '.join(card.labels) or 'no label')}<br>{element('span', card.facts)}"
        "</figcaption></figure>"
        for card in cards
    )
    style = (
        "<style>figure{width:640px}figure img{height:200px;max-width:420px}"
        "figcaption{color:#333}</style>"
    )
    path.write_text(page(title, style + element("h1", title) + figures), encoding="utf-8")


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


def _jpeg(pixels: np.ndarray | None, name: str) -> str:
    """Embed RGB pixels, or one value per pixel in colours from the lowest to the highest; nothing
    where a set has none."""
    if pixels is None:
        return ""
    from matplotlib.image import imsave

    encoded = io.BytesIO()
    imsave(encoded, pixels, format="jpeg", pil_kwargs={"quality": 85})
    return picture(encoded.getvalue(), name, "jpeg")
