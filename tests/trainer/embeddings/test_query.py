"""What a query file may be: every sound and picture that people have."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.embeddings.query import read_query

pytestmark = pytest.mark.field
HZ = 16000
Y, X = np.mgrid[0:96, 0:128]
GREY = ((X * 2) ^ Y).astype(np.uint8)


def frame_of(path: Path) -> np.ndarray:
    frame = read_query(str(path), 0.0, PretrainConfig()).frame
    assert frame is not None
    return frame


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        read_query(str(path), 0.0, PretrainConfig())
    return str(error.value)


def save_sound(path: Path, container: str, codec: str, hz: int) -> None:
    """Two seconds of a tone whose peak is 0.3."""
    samples = (0.3 * 32767 * np.sin(2 * np.pi * 440 * np.arange(2 * HZ) / HZ)).astype(np.int16)
    with av.open(path, "w", format=container) as output:
        track = output.add_stream(codec, rate=hz, layout="mono")
        assert isinstance(track, av.AudioStream)
        if codec == "wmav2":
            track.bit_rate = 32000
        output.start_encoding()
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = HZ, 0, Fraction(1, HZ)
        converter, queue = av.AudioResampler(track.format, "mono", hz), av.AudioFifo()
        for part in [*converter.resample(frame), *converter.resample(None)]:
            queue.write(part)
        while part := queue.read(track.codec_context.frame_size or 1024, partial=True):
            output.mux(track.encode(part))
        output.mux(track.encode(None))


@pytest.mark.parametrize(
    ("container", "codec", "hz"),
    [
        ("mp3", "libmp3lame", HZ),
        ("mp2", "mp2", HZ),
        ("adts", "aac", HZ),
        ("latm", "aac", HZ),
        ("ipod", "aac", HZ),
        ("amr", "libopencore_amrnb", 8000),
        ("aiff", "pcm_s16be", HZ),
        ("au", "pcm_mulaw", HZ),
        ("caf", "alac", HZ),
        ("w64", "pcm_s16le", HZ),
        ("voc", "pcm_s16le", HZ),
        ("sox", "pcm_s32le", HZ),
        ("ac3", "ac3", 32000),
        ("eac3", "eac3", 32000),
        ("wv", "wavpack", HZ),
        ("tta", "tta", HZ),
        ("asf", "wmav2", HZ),
        ("ogg", "libopus", HZ),
        ("matroska", "flac", HZ),
    ],
)
def test_a_sound_of_any_format_is_heard(
    tmp_path: Path, container: str, codec: str, hz: int
) -> None:
    save_sound(tmp_path / "sound", container, codec, hz)
    query = read_query(str(tmp_path / "sound"), 1.5, PretrainConfig())
    assert query.audio is not None and query.frame is None
    assert len(query.audio) == 1.5 * HZ
    assert np.abs(query.audio).max() / 32768 == pytest.approx(0.3, rel=0.15)


def test_a_list_of_other_files_is_no_sound(tmp_path: Path) -> None:
    save_sound(tmp_path / "sound.mp3", "mp3", "libmp3lame", HZ)
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile sound.mp3\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\nsound.mp3\n")
    for name in ("list.ffconcat", "list.m3u8"):
        assert "can't be used (open_failed" in error_of(tmp_path / name)


def test_grey_pixels_of_all_depths_are_the_same_picture(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    Image.fromarray((GREY / 255).astype(np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "16.pgm").write_bytes(
        b"P5 128 96 65535\n" + (GREY.astype(">u2") * 257).astype(">u2").tobytes()
    )
    for name in ("16.png", "16.tif", "16.pgm", "float.tif"):
        np.testing.assert_array_equal(frame_of(tmp_path / name), np.stack([GREY] * 3, -1))


def test_pixels_whose_white_is_unknown_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "255.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "nan.tif")
    Image.fromarray(GREY.astype(np.int32) * 1000).save(tmp_path / "32.tif")
    assert "its pixels are from 0.0 to 255.0, and are read as from 0" in error_of(
        tmp_path / "255.tif"
    )
    assert "its pixels are from nan to nan" in error_of(tmp_path / "nan.tif")
    assert "from 0 to 255000, and are read as from 0 (black) to 65535" in error_of(
        tmp_path / "32.tif"
    )


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    hidden = np.zeros((96, 128, 4), np.uint8)
    hidden[..., 0] = 255
    hidden[20:70, 30:90] = (0, 90, 200, 255)
    expected = np.full((96, 128, 3), 255, np.uint8)
    expected[20:70, 30:90] = (0, 90, 200)
    Image.fromarray(hidden).save(tmp_path / "colour.png")
    Image.fromarray(hidden).save(tmp_path / "colour.webp", lossless=True)
    for name in ("colour.png", "colour.webp"):
        np.testing.assert_array_equal(frame_of(tmp_path / name), expected)
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=5)
    seen = np.where(GREY == 5, 255, GREY)
    np.testing.assert_array_equal(frame_of(tmp_path / "palette.png"), np.stack([seen] * 3, -1))


def test_pictures_of_phones_are_seen_or_told_apart(tmp_path: Path) -> None:
    picture = Image.fromarray(np.stack([GREY] * 3, -1))
    picture.save(tmp_path / "photo.avif", quality=95)
    picture.save(tmp_path / "two.jpg", format="MPO", save_all=True, append_images=[picture])
    for name in ("photo.avif", "two.jpg"):
        assert abs(frame_of(tmp_path / name).mean() - GREY.mean()) < 1
    for brand in (b"heic", b"mif1"):
        (tmp_path / "photo.heic").write_bytes(
            b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(200)
        )
        assert error_of(tmp_path / "photo.heic").endswith(
            "is a HEIC picture, which is not read; save it as JPEG"
        )
