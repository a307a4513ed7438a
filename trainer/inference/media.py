"""What a model is given: files, URLs, arrays and pictures, cut into windows of sound and picture.

Files are decoded by the code that packs them, so that a file and its packed clip give the same
arrays.
"""

import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from cavmae.credentials import redacted
from cavmae.dataloaders.constants import AUDIO_HZ, MIDDLE_FRAME
from cavmae.dataloaders.media.audio_track import MAXIMUM_HZ, MINIMUM_HZ, resample
from cavmae.dataloaders.media.decode_clip import SILENT_PEAK, decode_clip, stream_seconds
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.media.video_track import rgb_pixels
from cavmae.dataloaders.packing.pack_clip import FrameChoice, ten_frames
from cavmae.dataloaders.shards.storage import as_os_errors

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "GIF", "PPM")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Main brands of HEIF files that are not AVIF: pictures whose codec Pillow does not have."""
BACKGROUND = "white"
"""What a picture's transparent parts are laid onto."""
LARGEST_SAMPLE = 16.0
"""Of floats, which are read as -1 to 1: a decoder overshoots a little, and int16 values are far
above."""
_SETTINGS = DecodeSettings(streams="any", keep_silent=True)

Medium = str | os.PathLike[str] | tuple[Any, int] | Image.Image
"""Path or URL of a sound, a picture or a video; `(samples, rate)`, a waveform of shape (samples,),
(channels, samples) or (samples, channels) and its samples per second; or a PIL picture."""


@dataclass(frozen=True)
class Window:
    """A part of a medium that a model takes at a time.

    Attributes:
        seconds: start and end in the medium; of a picture 0 and 0.
        audio: (samples,) float32 in -1 to 1, 16 kHz mono; None: no sound.
        frame: (height, width, 3) uint8; None: no picture.
    """

    seconds: tuple[float, float]
    audio: np.ndarray | None
    frame: np.ndarray | None


def name_of(medium: Medium) -> str:
    """Describe a medium for people, a URL without its signature."""
    if isinstance(medium, Image.Image):
        return f"a picture of {medium.width} x {medium.height} pixels"
    if isinstance(medium, tuple):
        return f"a waveform of shape {np.shape(medium[0])}"
    return redacted(os.fspath(medium))


def windows_of(
    medium: Medium, window_seconds: float, frame_choice: FrameChoice = "by_time"
) -> Iterator[Window]:
    """Cut a medium into windows, one after the other.

    A rest of less than half a second is left out; otherwise the last window ends with the medium,
    and overlaps the one before.

    Args:
        medium: what to cut. Of a video, each window has the middle one of its ten frames.
        window_seconds: length of each window; a shorter medium is one window.
        frame_choice: how ten frames are chosen; see `ten_frames`.

    Raises:
        ValueError: it can't be used; says which one, and why.
        OSError: a file or URL can't be read.
    """
    if isinstance(medium, Image.Image):
        try:
            yield Window((0.0, 0.0), None, _pixels(medium))
        except ValueError as error:
            raise ValueError(f"{name_of(medium)} can't be used: {error}") from error
    elif isinstance(medium, tuple):
        try:
            waveform = _waveform(*medium)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name_of(medium)} can't be used: {error}") from error
        yield from _cut(waveform, window_seconds)
    else:
        name = os.fspath(medium)
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no path; give it as text")
        with _local_file(name) as path:
            try:
                yield from _windows_of_file(path, window_seconds, frame_choice)
            except ClipError as error:
                advice = "; give a sound, a picture or a video" * (error.reason == "open_failed")
                raise ValueError(f"{name_of(name)} can't be used ({error}){advice}") from error
            except ValueError as error:
                raise ValueError(f"{name_of(name)} can't be used: {error}") from error


def window_starts(seconds: float, window_seconds: float) -> list[float]:
    """Return where the windows of a medium begin, in seconds; see `windows_of`."""
    count = max(1, math.ceil((seconds - _SETTINGS.min_seconds) / window_seconds))
    last = max(0.0, seconds - window_seconds)
    return [min(number * window_seconds, last) for number in range(count)]


@contextmanager
def _local_file(name: str) -> Iterator[str]:
    """Download a URL into a temporary folder; a path is left as it is."""
    if "://" not in name:
        yield name
        return
    try:
        filesystem, path = fsspec.url_to_fs(name)
    except (ImportError, ValueError) as error:  # a package or a protocol that is not there
        raise ValueError(f"{name_of(name)} can't be read: {error}") from error
    with tempfile.TemporaryDirectory(prefix="cavmae-") as folder:
        local = Path(folder, "file")
        try:
            with as_os_errors():
                filesystem.get_file(path, str(local))
        except OSError as error:  # it quotes the URL: not shown as a cause
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(redacted(f"{name} can't be read: {error}")) from None
        yield str(local)


def _windows_of_file(
    path: str, window_seconds: float, frame_choice: FrameChoice
) -> Iterator[Window]:
    picture = _picture(path)
    if picture is not None:
        yield Window((0.0, 0.0), None, picture)
        return
    lengths = stream_seconds(path, streams="any")
    if "video" not in lengths:
        clip = decode_clip(path, 0.0, math.inf, _SETTINGS)
        waveform = _as_float(clip.audio)
        _check_heard(waveform)
        yield from _cut(waveform, window_seconds)
        return

    def middle(times: list[float], seconds: float, rate: float) -> list[int]:
        return [ten_frames(times, seconds, rate, frame_choice)[MIDDLE_FRAME]]

    peak = 0.0
    for start in window_starts(max(lengths.values()), window_seconds):
        end = start + window_seconds
        clip = decode_clip(path, start, end, _SETTINGS, choose=middle)
        frame = None
        if clip.frames:
            wanted = middle(clip.times_seconds, clip.video_seconds, clip.frames_per_second)[0]
            planes = clip.frames[clip.frame_indexes.index(wanted)]
            video_frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame = rgb_pixels(video_frame, VideoReformatter())
        audio = _as_float(clip.audio) if len(clip.audio) else None
        peak = max(peak, float(np.abs(audio).max()) if audio is not None else 1.0)
        seconds = max(clip.video_seconds, len(clip.audio) / AUDIO_HZ)
        yield Window((start, start + seconds), audio, frame)
    _check_peak(peak)


def _cut(waveform: np.ndarray, window_seconds: float) -> Iterator[Window]:
    seconds, length = len(waveform) / AUDIO_HZ, round(window_seconds * AUDIO_HZ)
    for start in window_starts(seconds, window_seconds):
        first = round(start * AUDIO_HZ)
        part = waveform[first : first + length]
        yield Window((start, start + len(part) / AUDIO_HZ), part, None)


def _waveform(samples: Any, rate: int) -> np.ndarray:
    """Convert an array to (samples,) float32 at 16 kHz.

    Raises:
        ValueError: it is no waveform, or its rate no rate.
        TypeError: likewise.
    """
    array = np.asarray(samples)
    if not MINIMUM_HZ <= rate <= MAXIMUM_HZ:
        raise ValueError(f"its rate is {rate} samples per second; use {MINIMUM_HZ} or more")
    if array.ndim not in (1, 2):
        raise ValueError("use (samples,), (channels, samples) or (samples, channels)")
    if array.ndim == 2:  # there are more samples than channels
        array = array.mean(axis=int(np.argmin(array.shape)), dtype=np.float64).astype(array.dtype)
    mono = _as_float(array)
    if len(mono) < _SETTINGS.min_seconds * rate:
        raise ValueError(f"{len(mono)} samples are less than {_SETTINGS.min_seconds:g} s")
    if not np.isfinite(mono).all() or np.abs(mono).max() > LARGEST_SAMPLE:
        raise ValueError(
            f"its samples are from {mono.min():g} to {mono.max():g}, and floats are read as -1 to "
            "1; scale it, or give integers"
        )
    _check_heard(mono)
    return resample(mono, rate)


def _as_float(samples: np.ndarray) -> np.ndarray:
    """Scale integers to -1 to 1, as the loader does."""
    if np.issubdtype(samples.dtype, np.floating):
        return samples.astype(np.float32)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if not np.issubdtype(samples.dtype, np.signedinteger):
        raise ValueError(f"its type is {samples.dtype}; use floats, int16, int32 or uint8")
    return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)


def _check_heard(waveform: np.ndarray) -> None:
    _check_peak(float(np.abs(waveform).max(initial=0.0)))


def _check_peak(peak: float) -> None:
    """Refuse silence, as packing does."""
    if peak * 32768 <= SILENT_PEAK:
        raise ClipError("silent_audio", f"the largest sample is {peak * 32768:.0f} of 32768")


def _picture(path: str) -> np.ndarray | None:
    """Read `(height, width, 3)` uint8, rotated by its EXIF orientation; None: not a picture.

    Raises:
        ValueError: a picture that can't be used.
        OSError: the file can't be read.
    """
    with open(path, "rb") as file:  # an error of the file, not of the picture
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(file, formats=PICTURE_FORMATS) as picture:
                    return _pixels(picture)
        except UnidentifiedImageError:
            file.seek(0)
            _refuse_heif(file.read(12))
            return None
        except (
            OSError,
            SyntaxError,  # Pillow's for some damage
            Image.DecompressionBombWarning,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(str(error)) from error


def _refuse_heif(head: bytes) -> None:
    if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS:
        raise ValueError("it is a HEIC picture, which is not read; save it as JPEG")


def _pixels(picture: Image.Image) -> np.ndarray:
    """Convert to `(height, width, 3)` uint8."""
    upright = ImageOps.exif_transpose(picture)
    return np.asarray(_opaque(_eight_bit(upright)))


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Scale grey pixels of 16 bits, or floats from 0 to 1, which Pillow would cut off at 255."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    pixels = np.asarray(picture)
    white = 1.0 if picture.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= white):  # NaN too
        raise ValueError(
            f"its pixels are from {pixels.min()} to {pixels.max()}, and are read as from 0 (black) "
            f"to {white} (white); save it with 8 bits"
        )
    return Image.fromarray(np.rint(pixels / white * 255).astype(np.uint8))


def _opaque(picture: Image.Image) -> Image.Image:
    """Convert to RGB, transparent parts laid onto the background."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    background = Image.new("RGBA", picture.size, BACKGROUND)
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")
