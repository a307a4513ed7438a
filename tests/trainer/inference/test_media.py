"""What a model is given: every sound, picture and video that people have, in windows."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import av.stream
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cavmae.dataloaders.media.audio_codec import encode_audio
from cavmae.trainer.inference.media import Window, window_starts, windows_of

pytestmark = pytest.mark.field
HZ = 16000
Y, X = np.mgrid[0:96, 0:128]
GREY = ((X * 2) ^ Y).astype(np.uint8)


def frame_of(path: Path) -> np.ndarray:
    (window,) = windows_of(path, 1.0)
    assert window.frame is not None and window.audio is None
    return window.frame


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        list(windows_of(path, 1.0))
    assert str(path) in str(error.value)
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
    first, *_ = windows_of(str(tmp_path / "sound"), 1.5)
    assert first.audio is not None and first.frame is None
    assert len(first.audio) == 1.5 * HZ
    assert np.abs(first.audio).max() == pytest.approx(0.3, rel=0.15)


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


def tone(seconds: float, hz: int, dtype: str = "float32") -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * hz)) / hz)
    return (wave * np.iinfo(dtype).max).astype(dtype) if dtype != "float32" else wave.astype(dtype)


@pytest.mark.parametrize(
    ("seconds", "starts"),
    [
        (0.5, [0.0]),
        (10.0, [0.0]),
        (10.4, [0.0]),  # the rest is too short for a window
        (10.6, [0.0, 0.6]),
        (20.0, [0.0, 10.0]),
        (34.0, [0.0, 10.0, 20.0, 24.0]),
    ],
)
def test_windows_cover_a_medium_and_the_last_ends_with_it(
    seconds: float, starts: list[float]
) -> None:
    assert window_starts(seconds, 10.0) == pytest.approx(starts)


@pytest.mark.parametrize("hz", [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("dtype", ["float32", "int16", "int32"])
def test_a_waveform_of_any_rate_and_type_is_the_same_sound(hz: int, dtype: str) -> None:
    (window,) = windows_of((tone(2.0, hz, dtype), hz), 10.0)
    assert window.audio is not None and window.audio.dtype == np.float32
    assert window.seconds == (0.0, 2.0) and len(window.audio) == 2 * HZ
    inner = slice(HZ // 10, -HZ // 10)
    np.testing.assert_allclose(window.audio[inner], tone(2.0, HZ)[inner], atol=2e-3)


def test_channels_are_mixed_wherever_they_are() -> None:
    left, right = tone(1.0, HZ), np.zeros(HZ, np.float32)
    for array in (np.stack([left, right]), np.stack([left, right], axis=1)):
        (window,) = windows_of((array, HZ), 10.0)
        assert window.audio is not None
        np.testing.assert_allclose(window.audio, left / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("medium", "message"),
    [
        ((np.full(HZ, 12000.0), HZ), "from 12000 to 12000, and floats are read as -1 to 1"),
        ((np.full(HZ, np.nan), HZ), "from nan to nan"),
        ((np.zeros(HZ), HZ), "silent_audio"),
        ((np.ones(100), HZ), "100 samples are less than 0.5 s"),
        ((np.ones((2, 2, HZ)), HZ), "use .samples,."),
        ((np.ones(HZ), 0), "its rate is 0 samples per second"),
        ((np.array(["a"] * HZ), HZ), "its type is <U1"),
        ((np.ones(HZ, np.complex64), HZ), "its type is complex64"),
    ],
)
def test_an_array_that_is_no_sound_is_refused(medium: tuple[np.ndarray, int], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^a waveform of shape .* can't be used: .*{message}"):
        list(windows_of(medium, 10.0))


def save_video(path: Path, seconds: float, sound: bool, sound_seconds: float = 0.0) -> None:
    """Frames whose grey is ten times their second, with a tone or without sound."""
    with av.open(path, "w", format="mp4") as output:
        track = output.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        heard = output.add_stream("aac", rate=HZ, layout="mono") if sound else None
        for number in range(round(10 * seconds)):
            grey = np.full((64, 64, 3), number, np.uint8)
            output.mux(track.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        output.mux(track.encode(None))
        if heard:
            frame = av.AudioFrame.from_ndarray(
                tone(sound_seconds or seconds, HZ, "int16")[None], format="s16", layout="mono"
            )
            frame.sample_rate, frame.pts = HZ, 0
            queue = av.AudioFifo()
            for part in av.AudioResampler(heard.format, "mono", HZ).resample(frame):
                queue.write(part)
            while part := queue.read(1024, partial=True):
                output.mux(heard.encode(part))
            output.mux(heard.encode(None))


def windows(path: Path, seconds: float) -> list[Window]:
    return list(windows_of(path, seconds))


@pytest.mark.parametrize("sound", [True, False], ids=["with sound", "without"])
def test_each_window_of_a_video_has_its_own_frame(tmp_path: Path, sound: bool) -> None:
    save_video(tmp_path / "clip.mp4", 5.0, sound)
    found = windows(tmp_path / "clip.mp4", 2.0)
    assert [one.seconds[0] for one in found] == pytest.approx([0.0, 2.0, 3.0], abs=0.15)
    middles = [one.frame.mean() for one in found if one.frame is not None]
    assert middles == pytest.approx([11, 31, 41], abs=3)  # the sixth of ten: at 0.55 of a window
    assert all((one.audio is not None) == sound for one in found)


def test_a_video_whose_sound_ends_early_has_windows_without(tmp_path: Path) -> None:
    save_video(tmp_path / "clip.mp4", 6.0, sound=True, sound_seconds=2.1)
    found = windows(tmp_path / "clip.mp4", 2.0)
    assert [one.audio is not None for one in found] == [True, False, False]
    assert all(one.frame is not None for one in found)


def test_a_video_that_is_silent_throughout_is_refused_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        globals(), "tone", lambda seconds, hz, _: np.zeros(round(seconds * hz), "int16")
    )
    save_video(tmp_path / "clip.mp4", 5.0, sound=True)
    with pytest.raises(ValueError, match=r"clip\.mp4 can't be used \(silent_audio"):
        windows(tmp_path / "clip.mp4", 2.0)


def test_the_cover_of_a_song_is_no_picture(tmp_path: Path) -> None:
    with av.open(tmp_path / "song.mp3", "w", format="mp3") as output:
        track = output.add_stream("libmp3lame", rate=HZ, layout="mono")
        picture = output.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        red = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8), format="rgb24")
        output.mux(picture.encode(red))
        output.mux(picture.encode(None))
        frame = av.AudioFrame.from_ndarray(
            tone(2.0, HZ, "int16")[None], format="s16", layout="mono"
        )
        frame.sample_rate = HZ
        queue = av.AudioFifo()
        for part in av.AudioResampler(track.format, "mono", HZ).resample(frame):
            queue.write(part)
        while part := queue.read(576, partial=True):
            output.mux(track.encode(part))
        output.mux(track.encode(None))
    (window,) = windows(tmp_path / "song.mp3", 10.0)
    assert window.audio is not None and window.frame is None


def test_a_url_is_read_as_a_file_is(tmp_path: Path) -> None:
    save_video(tmp_path / "clip.mp4", 2.0, sound=True)
    (here,) = windows(tmp_path / "clip.mp4", 10.0)
    (there,) = windows_of(f"file://{tmp_path}/clip.mp4", 10.0)
    np.testing.assert_array_equal(here.frame, there.frame)
    np.testing.assert_array_equal(here.audio, there.audio)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        windows(tmp_path / "missing.mp4", 1.0)
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        list(windows_of(f"file://{tmp_path}/missing.mp4", 1.0))


def test_a_picture_is_seen_as_its_camera_noted(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "picture", "PNG", exif=turned)
    np.testing.assert_array_equal(frame_of(tmp_path / "picture"), np.rot90(pixels, -1))


@pytest.mark.parametrize("url", ["nothing://bucket/clip.mp4", "gs://bucket/clip.mp4"])
def test_a_url_of_a_kind_that_can_not_be_read_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=f"{url} can't be read: "):
        list(windows_of(url, 1.0))


def test_a_medium_whose_header_states_gigabytes_is_refused_by_its_header(tmp_path: Path) -> None:
    """Public reports: Pillow 5610 (text of a PNG), 9475, and pictures by their size alone."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    jpeg = bytearray(file.getvalue())
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 16_000, 16_000)
    (tmp_path / "bomb.jpg").write_bytes(jpeg[:691])
    assert "can't be used: Image size (256000000 pixels)" in error_of(tmp_path / "bomb.jpg")
    text = PngInfo()
    text.add_text("comment", "x" * (8 << 20), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=text)
    assert "can't be used: Decompressed data too large" in error_of(tmp_path / "bomb.png")
    flac = bytearray(encode_audio(np.arange(HZ, dtype=np.int16), "flac"))
    flac[18:26] = (HZ << 44 | 15 << 36 | 12 * 3600 * HZ).to_bytes(8, "big")
    (tmp_path / "bomb.flac").write_bytes(flac)
    assert "can't be used (too_large: its header states 12.0 h" in error_of(tmp_path / "bomb.flac")


def test_a_sound_from_a_pipe_that_states_no_length_is_heard(tmp_path: Path) -> None:
    wav = bytearray(encode_audio(np.arange(2 * HZ, dtype=np.int16), "wav"))
    wav[4:8] = wav[40:44] = b"\xff" * 4
    (tmp_path / "pipe.wav").write_bytes(wav)
    (window,) = windows_of(str(tmp_path / "pipe.wav"), 10.0)
    assert window.audio is not None and len(window.audio) == 2 * HZ
