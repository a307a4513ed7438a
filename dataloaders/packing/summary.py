"""The result of a packing run, and its rows for people."""

from dataclasses import dataclass


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


def summary_rows(summary: PackSummary) -> list[tuple[str, str]]:
    """Format a summary as names and values."""
    rows = [("clips packed", str(summary.clips)), ("length", f"{summary.seconds:.0f} s")]
    for tier, size in summary.bytes.items():
        each = size / summary.clips / 1000
        rows.append((f"tier {tier}", f"{size / 1e6:.1f} MB, {each:.0f} kB a clip"))
    rows += [(f"packed, with {cause}", str(count)) for cause, count in summary.timing.items()]
    if summary.cropped["clips"]:
        lost = (
            f"{summary.cropped['mean']:.1%} of the picture on average, {summary.cropped['max']:.1%}"
        )
        rows.append(("cropped (video)", f"{summary.cropped['clips']} clips: {lost} at most"))
    if summary.duplicates:
        rows.append(("packed, as an earlier clip is", f"{summary.duplicates}: duplicates.jsonl"))
    rows += [(f"skipped: {reason}", str(count)) for reason, count in summary.skipped.items()]
    if summary.resumed_shards:
        rows.append(("shards kept from an earlier run", str(summary.resumed_shards)))
    return rows
