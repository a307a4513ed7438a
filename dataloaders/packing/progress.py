"""Shows the progress of a packing run, and a table at the end."""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class PackSummary:
    """The result of a finished packing run."""

    clips: int
    """Number of clips packed."""
    skipped: dict[str, int]
    """Number of clips by reason."""
    timing: dict[str, int]
    """Number of packed clips by cause of `DecodedClip.timing`."""
    cropped: dict[str, float]
    """See `crop_statistics`."""
    duplicates: int
    """Number of packed clips with the audio and frames of an earlier one."""
    seconds: float
    """Total audio; of pictures alone, total video."""
    bytes: dict[str, int]
    """Bytes of the tars by tier."""
    resumed_shards: int
    """Number of shards finished by an earlier run."""


class PackProgress:
    """A progress bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, clips: int):
        self.console = console
        self.clips = clips
        self.done = self.skipped = 0
        self.started = self.printed = time.monotonic()
        self.bar = Progress(
            TextColumn("packing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[skipped]} skipped"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("", total=clips, skipped=0)

    def __enter__(self) -> "PackProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def count(self, *, packed: bool) -> None:
        """Count one clip."""
        self.done += 1
        self.skipped += not packed
        self.bar.update(self.task, advance=1, skipped=self.skipped)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed > PLAIN_PROGRESS_SECONDS:
            self.printed = now
            rate = self.done / (now - self.started)
            self.console.print(
                f"{self.done} of {self.clips} clips, {self.skipped} skipped, {rate:.1f} clips/s"
            )


def summary_table(summary: PackSummary, out: str) -> Table:
    """Format a summary."""
    table = Table(title=f"Packed into {out}", show_header=False)
    table.add_row("clips packed", str(summary.clips))
    table.add_row("length", f"{summary.seconds:.0f} s")
    for tier, size in summary.bytes.items():
        each = size / summary.clips / 1000
        table.add_row(f"tier {tier}", f"{size / 1e6:.1f} MB, {each:.0f} kB a clip")
    for cause, count in summary.timing.items():
        table.add_row(f"packed, with {cause}", str(count))
    if summary.cropped["clips"]:
        lost = (
            f"{summary.cropped['mean']:.1%} of the picture on average, {summary.cropped['max']:.1%}"
        )
        table.add_row("cropped (video)", f"{summary.cropped['clips']} clips: {lost} at most")
    if summary.duplicates:
        table.add_row("packed, as an earlier clip is", f"{summary.duplicates}: duplicates.jsonl")
    for reason, count in summary.skipped.items():
        table.add_row(f"skipped: {reason}", str(count))
    if summary.resumed_shards:
        table.add_row("shards kept from an earlier run", str(summary.resumed_shards))
    return table
