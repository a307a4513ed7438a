"""Headers of stored media, compared with the sample's JSON before a decoder believes them.

Decoders allocate whatever a header states: a JPEG of 700 bytes can state 16,000 x 16,000 pixels,
and a FLAC of 4 MB six hours. What is read here is what packing writes, where it writes it; anything
else is refused.
"""

import re
import struct

from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.dataloaders.media.encode_video import boxes

_JPEG_MARKER = re.compile(rb"\xff+([^\0\xff])", re.DOTALL)
"""As libjpeg's `next_marker` finds it: bytes of no segment before it are skipped."""
_JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
"""Frame headers, SOF0 to SOF15 (ITU-T T.81, table B.1)."""
_JPEG_ALONE = {0x01, *range(0xD0, 0xD9)}
"""Markers without a segment."""
_JPEG_DATA = {0xD9, 0xDA}
"""The end, and the start of a scan, before which the frame header has to come."""
SAMPLE_ENTRIES = {"vp9": b"vp09", "h264": b"avc1", "mjpeg": b"mp4v"}


class HeaderError(ValueError):
    """A header states something else than the sample's JSON, or is none that packing writes."""


def check_audio(data: bytes, codec: str, samples: int) -> None:
    """Check that stored audio states as many samples of 16 kHz mono as its JSON.

    Source: RFC 9639, section 8.2 (STREAMINFO); the canonical header of RIFF WAVE.

    Raises:
        HeaderError: it does not.
    """
    if codec == "flac":
        stated = int.from_bytes(data[18:26], "big")  # rate, channels - 1, bits - 1, samples
        intact = data[:8] == b"fLaC\0\0\0\x22" and stated == AUDIO_HZ << 44 | 15 << 36 | samples
    else:
        head = b"WAVEfmt " + _WAV_FORMAT + b"data" + (2 * samples).to_bytes(4, "little")
        intact = data[8:16] + data[20:28] + data[36:44] == head and len(data) == 44 + 2 * samples
    if not intact:
        raise HeaderError(f"its {codec} is not one of {samples} samples, 16 kHz mono, as its JSON")


_WAV_FORMAT = struct.pack("<HHI", 1, 1, AUDIO_HZ)
"""PCM, one channel."""


def check_jpeg(data: bytes, width: int, height: int) -> None:
    """Check that a JPEG states the size of its JSON.

    Raises:
        HeaderError: it does not, or is no JPEG.
    """
    stated = _jpeg_size(data)
    if stated != (width, height):
        found = f"states {stated[0]} x {stated[1]} pixels" if stated else "is no JPEG"
        raise HeaderError(f"its picture {found}, and its JSON {width} x {height}")


def check_frame(video: bytes, codec: str, width: int, height: int) -> None:
    """Check that a one-frame video states codec and size of its JSON, in its container and, where
    decoders allocate by that, in the frame (VP9).

    Source: ISO/IEC 14496-12, 8.5.2 (sample entry); VP9 bitstream specification, 6.2 (a key frame of
    profile 0) and annex B (several frames in one).

    Raises:
        HeaderError: it does not.
    """
    entry = video.find(b"stsd") + 16
    sizes = {struct.unpack(">HH", video[entry + 28 : entry + 32].rjust(4, b"\0"))}
    intact = video[entry : entry + 4] == SAMPLE_ENTRIES[codec]
    if codec == "vp9":
        frame = payload_of(video)
        header = int.from_bytes(frame[4:9], "big")
        sizes.add(((header >> 20 & 0xFFFF) + 1, (header >> 4 & 0xFFFF) + 1))
        key = frame[:1] in (b"\x82", b"\x83") and frame[1:4] == b"\x49\x83\x42"
        intact &= key and frame[-1] & 0xE0 != 0xC0
    if not intact or sizes != {(width, height)}:
        stated = " and ".join(f"{wide} x {high}" for wide, high in sorted(sizes))
        raise HeaderError(
            f"its frame states {stated} pixels{'' if intact else f' and is no {codec} of packing'}"
            f", and its JSON {width} x {height}"
        )


def payload_of(video: bytes) -> bytes:
    """The bytes of the frame that a one-frame video holds: of MJPEG, a whole JPEG.

    Raises:
        HeaderError: the file holds no frame.
    """
    try:
        return next(video[start + 8 : end] for name, start, end in boxes(video) if name == b"mdat")
    except (ValueError, StopIteration) as error:
        raise HeaderError(f"the file holds no frame: {error}") from error


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in a JPEG's frame header; None: there is none."""
    at = 2
    while data[:2] == b"\xff\xd8" and (found := _JPEG_MARKER.search(data, at)):
        marker, at = found[1][0], found.end()
        if marker in _JPEG_SIZES:
            height, width = struct.unpack(">HH", data[at + 3 : at + 7].ljust(4, b"\0"))
            return width, height
        if marker in _JPEG_DATA:
            break
        if marker not in _JPEG_ALONE:
            at += int.from_bytes(data[at : at + 2], "big")
    return None
