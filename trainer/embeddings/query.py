"""A media file as a query: its sound and a frame, processed as packing and the loader do."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps, UnidentifiedImageError

from cavmae.dataloaders.constants import AUDIO_HZ, MIDDLE_FRAME
from cavmae.dataloaders.loading.augment import center_crop
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.reader import SHORTEST_AUDIO_SAMPLES, EncodedClip, ReadTask
from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.dataloaders.media.decode_clip import decode_audio_file, decode_clip
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.media.log_mel import HOP_SAMPLES, WINDOW_SAMPLES, log_mel
from cavmae.dataloaders.media.video_track import rgb_pixels
from cavmae.dataloaders.packing.pack_clip import ten_frames
from cavmae.trainer.config.configs import RunConfig
from cavmae.trainer.model.encoder import AudioVideoEncoder

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "GIF", "PPM")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""Main brands of HEIF files that are not AVIF: pictures whose codec Pillow does not have."""
BACKGROUND = "white"
"""What a picture's transparent parts are laid onto."""


@dataclass(frozen=True)
class MediaQuery:
    """Sound and frame of a file.

    Attributes:
        audio: (samples,) int16, 16 kHz mono; None: no sound.
        frame: (height, width, 3) uint8; None: no picture.
    """

    audio: np.ndarray | None
    frame: np.ndarray | None


def read_query(path: str, seconds: float, run: RunConfig) -> MediaQuery:
    """Read the sound and the middle frame of the beginning of a file, or a picture.

    Args:
        path: sound, picture, or video with sound, told by its content.
        seconds: length to read; 0: as long as the run's model hears.
        run: configuration of the model.

    Raises:
        ValueError: the file can't be used.
        OSError: it can't be read.
    """
    picture = _picture(path)
    if picture is not None:
        return MediaQuery(None, picture)
    heard = ((run.model.audio_frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES) / AUDIO_HZ
    seconds = seconds or run.data.window_seconds or heard
    settings = DecodeSettings()
    try:
        try:
            clip = decode_clip(path, 0.0, seconds, settings)
        except ClipError as error:
            if error.reason not in ("no_video", "open_failed"):  # sound files are no clips
                raise
            return MediaQuery(decode_audio_file(path, seconds, settings)[0], None)
    except ClipError as error:
        if error.reason == "no_audio":
            raise ValueError(
                f"query {path} is a video without sound; give one of its frames as a picture, or a "
                "file with sound"
            ) from error
        raise ValueError(
            f"query {path} can't be used ({error}); give a sound, such as WAV, FLAC, MP3, M4A or "
            "Opus, a picture, such as JPEG, PNG or AVIF, or a video with sound"
        ) from error
    chosen = ten_frames(
        clip.times_seconds, clip.video_seconds, clip.frames_per_second, run.data.frame_choice
    )
    planes = VideoFrame.from_ndarray(clip.frames[chosen[MIDDLE_FRAME]], format="yuv420p")
    return MediaQuery(clip.audio, rgb_pixels(planes, VideoReformatter()))


def _picture(path: str) -> np.ndarray | None:
    """Read `(height, width, 3)` uint8, rotated by its EXIF orientation; None: not a picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=PICTURE_FORMATS) as picture:
                return np.asarray(_opaque(_eight_bit(ImageOps.exif_transpose(picture))))
    except UnidentifiedImageError:
        _refuse_heif(path)
        return None
    except (
        OSError,
        ValueError,
        SyntaxError,  # Pillow's for some damage
        Image.DecompressionBombWarning,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"query {path} can't be used as a picture: {error}") from error


def _refuse_heif(path: str) -> None:
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS:
        raise ValueError(f"query {path} is a HEIC picture, which is not read; save it as JPEG")


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


@torch.no_grad()
def embed_query(
    model: AudioVideoEncoder, run: RunConfig, query: MediaQuery
) -> dict[str, np.ndarray]:
    """Embed the query: `audio_embedding` and `video_embedding`, (width,) float32, if it has them.

    Args:
        model: of the run, set to evaluate.
        run: its configuration.
        query: with a sound, a frame, or both.
    """
    device, embedded = model.norm.weight.device, {}
    if query.audio is not None:
        heard = log_mel(
            [torch.from_numpy(query.audio)], run.model.mel_bins, run.model.audio_frames, device
        )
        heard = (heard - run.data.log_mel_mean) / run.data.log_mel_std
        embedded["audio_embedding"] = model.embed_audio(heard)[0].cpu().numpy()
    if query.frame is not None:
        seen = torch.from_numpy(_as_input(query.frame, run.model.image_size)).to(device)
        embedded["video_embedding"] = model.embed_video(seen)[0].cpu().numpy()
    return embedded


def _as_input(frame: np.ndarray, image_size: int) -> np.ndarray:
    """Compute (1, 3, size, size) float32 by the loader's graph, which needs a sound as well."""
    height, width, _ = frame.shape
    decoder = ClipDecoder(False, image_size, maximum_batch=1, threads=1, gpu=None)
    clip = EncodedClip(
        task=ReadTask(0, 0, 0, 0),
        sample_id="query",
        labels=(),
        audio=encode_audio(np.zeros(SHORTEST_AUDIO_SAMPLES, np.int16), "wav"),
        frames=(b"\0",),
        pixels=(frame,),
        crop=center_crop(height, width, image_size),
        flipped=False,
        frame_seconds=(0.0,),
        audio_seconds=(0.0, 0.0),
    )
    decoder.schedule([clip])
    return decoder.collect().frames[:, 0]
