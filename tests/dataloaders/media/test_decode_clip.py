"""What is decoded from a file, when it is shown and heard, and why a file is refused."""

import csv
import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image

from cavmae.dataloaders.media import audio_codec, video_track
from cavmae.dataloaders.media.audio_codec import AudioCodec, encode_audio
from cavmae.dataloaders.media.audio_track import resample
from cavmae.dataloaders.media.decode_clip import (
    DecodedClip,
    decode_clip,
    stream_seconds,
)
from cavmae.dataloaders.media.decode_frame import FrameError, decode_original
from cavmae.dataloaders.media.encode_video import encode_jpegs, encode_video
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.packing.pack_clip import ten_frames

WriteVideo = Callable[..., Path]
MP4 = {"codec": "libx264", "pixel_format": "yuv420p", "sound_codec": "aac"}


def decode(path: Path, start: float = 0.0, end: float = 10.0, **settings: object) -> DecodedClip:
    return decode_clip(str(path), start, end, DecodeSettings(**settings))  # type: ignore[arg-type]


def reason(path: Path, start: float = 0.0, end: float = 10.0, **settings: object) -> str:
    with pytest.raises(ClipError) as caught:
        decode(path, start, end, **settings)
    return caught.value.reason


def greys(clip: DecodedClip) -> list[int]:
    """RGB level of each frame, from the brightness of the stored plane."""
    luma = [float(frame[: clip.height].mean()) for frame in clip.frames]
    return [round((level - 16) * 255 / 219) for level in luma]


def tone(hertz: float, seconds: float, hz: int = 16000, peak: float = 0.5) -> np.ndarray:
    """(samples,) int16."""
    angle = 2 * np.pi * hertz * np.arange(round(seconds * hz)) / hz
    return (np.sin(angle) * peak * 32767).astype(np.int16)


def level(audio: np.ndarray) -> float:
    """Root mean square, full scale 1, without the first and last 50 ms."""
    return float(np.sqrt(np.mean((audio[800:-800] / 32768.0) ** 2)))


def click(at: float, seconds: float, hz: int) -> np.ndarray:
    """Silence with a click of 5 ms."""
    samples = np.zeros(round(seconds * hz), np.int16)
    samples[round(at * hz) : round((at + 0.005) * hz)] = 20000
    return samples


def heard_at(audio: np.ndarray) -> float:
    """Seconds at which the middle of the loudest 5 ms lies."""
    power = np.convolve(audio.astype(float) ** 2, np.ones(80), "same")
    return float(np.argmax(power)) / 16000


# ----------------------------------------------------------------------------------- the timeline


def test_frames_carry_their_presentation_times(tmp_path: Path, write_video: WriteVideo) -> None:
    times = [0.0, 0.2, 0.25, 0.3, 0.9]  # a variable rate
    pictures = [np.full((48, 64, 3), 40 * (i + 1), np.uint8) for i in range(5)]
    clip = decode(write_video(tmp_path / "v.mkv", frames=pictures, times=times))
    assert clip.times_seconds == pytest.approx(times, abs=1e-3)
    assert greys(clip) == pytest.approx([40, 80, 120, 160, 200], abs=1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pcm.mkv", {}),
        ("aac.mp4", MP4),
        ("mp3.avi", {"codec": "mpeg4", "pixel_format": "yuv420p", "sound_codec": "libmp3lame"}),
        ("aac.ts", MP4),
    ],
)
def test_sound_is_heard_when_its_frame_is_shown(
    tmp_path: Path, write_video: WriteVideo, name: str, arguments: dict
) -> None:
    """Codec delay, container offsets and rounding stay under 3 ms."""
    pictures = [np.full((48, 64, 3), 200 if i == 5 else 30, np.uint8) for i in range(10)]
    sound = click(0.5, 1.0, 44100)
    path = write_video(tmp_path / name, frames=pictures, sound=sound, sound_hz=44100, **arguments)
    clip = decode(path)
    flash = clip.times_seconds[int(np.argmax(greys(clip)))]
    assert flash == pytest.approx(0.5, abs=0.05)
    assert heard_at(clip.audio) == pytest.approx(flash + 0.0025, abs=0.003)


def test_a_timeline_that_starts_late_counts_from_its_start(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    """As in recordings cut from a broadcast."""
    times = [7.0 + number / 10 for number in range(10)]
    clip = decode(write_video(tmp_path / "v.mkv", times=times, sound_start=7.2))
    assert clip.times_seconds == pytest.approx([number / 10 for number in range(10)], abs=1e-3)
    assert len(clip.audio) == 19200 and not clip.audio[:3200].any()


def test_late_sound_follows_zeros(tmp_path: Path, write_video: WriteVideo) -> None:
    clip = decode(write_video(tmp_path / "v.mkv", sound_start=0.3))
    assert not clip.audio[: round(0.3 * 16000)].any()
    assert np.abs(clip.audio[4800:4900]).max() > 1000
    assert len(clip.audio) == round(1.3 * 16000)


def test_a_pause_in_the_timestamps_is_silence(tmp_path: Path, write_video: WriteVideo) -> None:
    sound = np.tile(np.array([9000, -9000], np.int16), 8192)
    path = write_video(tmp_path / "v.mkv", sound=sound, pause_seconds=0.25)
    audio = decode(path).audio
    assert len(audio) == len(sound) + 4000
    loud = np.abs(audio) > 4000
    assert loud[:8192].all() and not loud[8192:12192].any() and loud[12192:].all()


def test_a_clip_is_the_same_cut_out_of_the_whole(tmp_path: Path, write_video: WriteVideo) -> None:
    pictures = [np.full((48, 64, 3), 20 + 2 * i, np.uint8) for i in range(100)]
    sound = np.random.default_rng(0).integers(-9000, 9000, 160000).astype(np.int16)
    path = write_video(tmp_path / "v.mkv", frames=pictures, sound=sound)
    whole, part = decode(path), decode(path, 4.0, 6.5)
    assert greys(part) == greys(whole)[40:65]
    assert part.times_seconds == pytest.approx([i / 10 for i in range(25)], abs=1e-3)
    np.testing.assert_array_equal(part.audio, whole.audio[64000:104000])


@pytest.mark.parametrize("packet_seconds", [5, 10])
def test_sound_in_long_packets_that_a_seek_jumps_over_is_found(
    tmp_path: Path, write_video: WriteVideo, packet_seconds: int
) -> None:
    pictures = [np.full((48, 64, 3), 90, np.uint8)] * 100
    packet_samples = packet_seconds * 16000
    path = write_video(
        tmp_path / "v.mkv", frames=pictures, sound=tone(440, 10), packet_samples=packet_samples
    )
    np.testing.assert_array_equal(decode(path, 4.5, 6.5).audio, tone(440, 10)[72000:104000])


def test_a_window_in_compressed_video_gives_the_frames_of_the_whole(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    pictures = [np.full((48, 64, 3), 20 + 2 * i, np.uint8) for i in range(100)]
    path = write_video(tmp_path / "v.mp4", frames=pictures, sound=tone(440, 10), **MP4)
    assert greys(decode(path, 5.3, 6.3)) == greys(decode(path))[53:63]


def test_a_frame_already_shown_at_the_start_has_time_zero(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    clip = decode(write_video(tmp_path / "v.mkv"), 0.25, 0.99)
    assert clip.times_seconds[:2] == pytest.approx([0.0, 0.05], abs=1e-3)
    assert greys(clip)[:2] == pytest.approx([60, 80], abs=1)


def test_a_window_after_the_end_is_refused(tmp_path: Path, write_video: WriteVideo) -> None:
    assert reason(write_video(tmp_path / "v.mkv"), 5.0, 8.0) == "window_outside"


def test_a_window_where_the_video_has_ended_is_refused(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    path = write_video(tmp_path / "v.mkv", sound=tone(440, 5))
    assert reason(path, 3.0, 5.0) == "window_outside"


def test_one_frame_with_longer_sound_is_a_clip(tmp_path: Path, write_video: WriteVideo) -> None:
    pictures = [np.full((48, 64, 3), 90, np.uint8)]
    clip = decode(write_video(tmp_path / "v.mkv", frames=pictures))
    assert greys(clip) == [90]
    assert ten_frames(clip.times_seconds, clip.video_seconds, 10, "by_time") == [0] * 10


def test_avi_frames_that_were_reordered_are_in_order(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    """AVI knows decoding times only; one frame may be lost where that is noticed."""
    pictures = [np.full((48, 64, 3), 20 + 4 * i, np.uint8) for i in range(50)]
    path = tmp_path / "v.avi"
    arguments = {**MP4, "sound_codec": "libmp3lame", "codec_options": {"bf": "2"}}
    write_video(path, frames=pictures, sound=tone(440, 5), **arguments)
    clip = decode(path)
    assert len(clip.frames) >= 48
    assert clip.times_seconds == sorted(set(clip.times_seconds))
    assert greys(clip) == sorted(greys(clip))


def test_video_fps_keeps_the_first_frame_of_each_slot(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    clip = decode(write_video(tmp_path / "v.mkv"), video_fps=4)
    assert clip.times_seconds == pytest.approx([0.0, 0.3, 0.5, 0.8], abs=1e-3)
    assert clip.frames_per_second == 4


def test_length_comes_from_packets_and_not_from_the_header(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    path = write_video(tmp_path / "v.mkv", sound=tone(440, 1.5))
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # the Duration element of Matroska, a double
    data[at : at + 8] = struct.pack(">d", 3.6e11)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.duration == 3.6e14, "the header does not lie as it should"
    assert max(stream_seconds(str(path)).values()) == pytest.approx(1.5, abs=0.05)
    assert len(decode(path).audio) == 24000


# ------------------------------------------------------------------------------------------ sound


def test_the_mix_of_equal_channels_is_as_loud_as_one(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    both = np.stack([tone(440, 1)] * 2, axis=1)
    clip = decode(write_video(tmp_path / "v.mkv", sound=both, layout="stereo"))
    assert level(clip.audio) == pytest.approx(level(tone(440, 1)), rel=0.01)


def test_first_takes_the_first_channel_alone(tmp_path: Path, write_video: WriteVideo) -> None:
    two = np.stack([tone(440, 1), tone(1000, 1)], axis=1)
    path = write_video(tmp_path / "v.mkv", sound=two, layout="stereo")
    np.testing.assert_array_equal(decode(path, audio_channel="first").audio, two[:, 0])


def test_six_loud_channels_do_not_clip(tmp_path: Path, write_video: WriteVideo) -> None:
    six = np.stack([tone(440, 1, peak=0.99)] * 6, axis=1)
    clip = decode(write_video(tmp_path / "v.mkv", sound=six, layout="5.1"))
    pure = np.corrcoef(clip.audio[800:-800], tone(440, 1)[800:-800])[0, 1]
    assert pure > 0.9999
    assert 0.5 < np.abs(clip.audio / 32768).max() <= 1


def test_of_two_sound_tracks_the_first_is_taken(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "v.mkv", sound=tone(440, 1), second_sound=tone(3000, 1))
    np.testing.assert_array_equal(decode(path).audio, tone(440, 1))


def test_resampling_filters_what_16_khz_cannot_carry() -> None:
    assert level(resample(tone(12000, 1, 48000), 48000)) < 1e-3 * level(tone(440, 1))


@pytest.mark.parametrize("hz", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resampling_keeps_length_level_and_place(hz: int) -> None:
    resampled = resample(tone(1000, 1, hz), hz)
    assert len(resampled) == 16000
    assert level(resampled) == pytest.approx(level(tone(1000, 1)), rel=0.01)
    assert heard_at(resample(click(0.5, 1, hz), hz)) == pytest.approx(0.5025, abs=0.001)


def test_silence_is_refused_unless_it_is_wanted(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "v.mp4", sound=np.zeros(16000, np.int16), **MP4)
    assert reason(path) == "silent_audio"
    assert not decode(path, keep_silent=True).audio.any()


@pytest.mark.parametrize("codec", ["flac", "wav"])
def test_stored_sound_returns_the_samples(codec: AudioCodec) -> None:
    audio = np.random.default_rng(0).integers(-32768, 32768, 30001).astype(np.int16)
    stored = encode_audio(audio, codec)
    np.testing.assert_array_equal(audio_codec.decode_audio(stored), audio)
    with av.open(io.BytesIO(stored), "r") as container:
        assert container.streams.audio[0].rate == 16000


# ----------------------------------------------------------------------------------------- frames


def assert_any_moment_is_what_the_whole_clip_shows(path: Path, clip: DecodedClip) -> None:
    """Frames first, last and between, each decoded alone from the bytes of the file."""
    video = path.read_bytes()
    for index in sorted({0, 1, len(clip.frames) // 2, len(clip.frames) * 2 // 3, -1}):
        index %= len(clip.frames)
        alone = decode_original(video, clip.times_seconds[index], clip.width, clip.height)
        (whole,) = as_rgb([clip.frames[index]])
        np.testing.assert_array_equal(alone, whole)


def as_rgb(frames: list[np.ndarray]) -> list[np.ndarray]:
    pictures = (av.VideoFrame.from_ndarray(planes, format="yuv420p") for planes in frames)
    return [video_track.rgb_pixels(picture, VideoReformatter()) for picture in pictures]


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_any_moment_of_a_file_can_be_decoded_alone(
    tmp_path: Path, write_video: WriteVideo, start: float
) -> None:
    """With frames that are reordered, seconds after the last key frame, and sound from later on."""
    pictures = [np.full((48, 64, 3), 20 + 2 * i, np.uint8) for i in range(100)]
    options = {"codec_options": {"g": "60", "preset": "veryfast", "bf": "3"}}
    sound = tone(440, 9)
    path = write_video(
        tmp_path / "v.mp4", frames=pictures, sound=sound, sound_start=start, **MP4, **options
    )
    clip = decode(path)
    assert len(clip.frames) == 100
    assert_any_moment_is_what_the_whole_clip_shows(path, clip)


def test_a_moment_of_no_video_is_an_error() -> None:
    with pytest.raises(FrameError, match="the frame at 1 s cannot be decoded: open_failed"):
        decode_original(b"no video" * 99, 1.0, 64, 48)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((17, 13), (16, 12)),
        ((320, 8), (320, 8)),
        ((400, 300), (340, 256)),
        ((300, 400), (256, 340)),
    ],
)
def test_frames_are_scaled_down_to_the_short_side_and_to_even_sizes(
    tmp_path: Path, write_video: WriteVideo, stored: tuple[int, int], expected: tuple[int, int]
) -> None:
    pictures = [np.full((stored[1], stored[0], 3), 128, np.uint8)] * 2
    clip = decode(write_video(tmp_path / "v.mkv", frames=pictures))
    assert (clip.width, clip.height) == expected
    assert Image.open(io.BytesIO(encode_jpegs([clip.frames[0]])[0])).size == expected
    with av.open(io.BytesIO(encode_video(clip.frames, expected, "vp9", 10)), "r") as container:
        assert [(one.width, one.height) for one in container.decode(video=0)] == [expected] * 2


def test_pixels_are_made_square(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "v.mp4", pixel_aspect=Fraction(2, 1), **MP4)
    clip = decode(path)
    assert (clip.width, clip.height) == (128, 48)


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((0, 1, -1, 0), "top"),  # as a phone held upright writes it: turn clockwise
        ((0, -1, 1, 0), "bottom"),
        ((-1, 0, 0, -1), "right"),
    ],
)
def test_the_display_matrix_turns_the_frame(
    tmp_path: Path, write_video: WriteVideo, matrix: tuple[int, int, int, int], bright: str
) -> None:
    picture = np.full((48, 64, 3), 30, np.uint8)
    picture[:, :32] = 220  # the left half
    path = write_video(tmp_path / "v.mp4", frames=[picture] * 10, **MP4)
    data = bytearray(path.read_bytes())
    unturned = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(unturned, data.index(b"tkhd"))
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    clip = decode(path)
    assert (clip.width, clip.height) == ((64, 48) if bright == "right" else (48, 64))
    luma = clip.frames[0][: clip.height].astype(float)
    halves = {
        "top": luma[: clip.height // 2].mean(),
        "bottom": luma[clip.height // 2 :].mean(),
        "left": luma[:, : clip.width // 2].mean(),
        "right": luma[:, clip.width // 2 :].mean(),
    }
    assert max(halves, key=lambda side: halves[side]) == bright


@pytest.mark.parametrize("pixel_format", ["gray", "yuv420p10le", "yuv444p", "bgr0"])
def test_every_pixel_format_gives_the_same_grey(
    tmp_path: Path, write_video: WriteVideo, pixel_format: str
) -> None:
    path = write_video(tmp_path / "v.mkv", pixel_format=pixel_format)
    picture = np.asarray(Image.open(io.BytesIO(encode_jpegs(decode(path).frames)[4])))
    assert picture.shape == (48, 64, 3)
    assert np.abs(picture.astype(int) - 100).max() <= 2


@pytest.mark.parametrize("colour", [(200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 140, 190)])
@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
def test_colours_survive_whatever_matrix_the_source_states(
    colour: tuple[int, int, int], matrix: str
) -> None:
    picture = np.full((96, 128, 3), colour, np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv444p", dst_colorspace=matrix, interpolation=video_track.EXACT
    )
    frame.colorspace = {"ITU601": 5, "ITU709": 1}[matrix]  # the numbers of ITU-T H.273
    planes = video_track.scale_frame(frame, 64, 48, VideoReformatter())
    shown = np.asarray(Image.open(io.BytesIO(encode_jpegs([planes])[0]))).astype(int)
    assert np.abs(shown.mean(axis=(0, 1)) - colour).max() < 3


@pytest.mark.parametrize("codec", ["vp9", "h264", "mjpeg"])
def test_every_frame_of_encoded_video_is_a_key_frame(
    tmp_path: Path, write_video: WriteVideo, codec: str
) -> None:
    clip = decode(write_video(tmp_path / "v.mkv"))
    video = encode_video(clip.frames, (64, 48), codec, 10)  # type: ignore[arg-type]
    with av.open(io.BytesIO(video), "r") as container:
        shown = list(container.decode(video=0))
    assert all(frame.key_frame for frame in shown)
    levels = [frame.to_ndarray(format="gray").mean() for frame in shown]
    assert levels == pytest.approx([20 * (i + 1) for i in range(10)], abs=3)


# ------------------------------------------------------------------------------------- ten frames


def test_by_time_takes_the_frame_shown_at_the_middle_of_each_tenth() -> None:
    times = [0.0, 0.2, 0.4, 0.6, 0.8]
    assert ten_frames(times, 1.0, 5, "by_time") == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_by_time_follows_a_variable_rate() -> None:
    times = [0.0, 0.9, 0.92, 0.94, 0.96, 0.98]
    assert ten_frames(times, 1.0, 5, "by_time") == [0] * 9 + [3]


def test_published_takes_the_frame_before_the_computed_index() -> None:
    expected = [0, 28, 58, 88, 118, 148, 178, 208, 238, 268]
    assert ten_frames([i / 30 for i in range(299)], 9.98, 29.97, "published") == expected


# ---------------------------------------------------------------------------------------- refusal


def test_files_that_hold_no_media_are_refused_by_name(tmp_path: Path) -> None:
    def file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    assert reason(tmp_path / "absent.mp4") == "missing_file"
    assert reason(tmp_path) == "not_a_file"
    assert reason(file("empty.mp4", b"")) == "empty_file"
    assert reason(file("text.mp4", b"To be, or not to be. " * 50)) == "open_failed"
    assert reason(file("page.mp4", b"<html><h1>404 Not Found</h1></html>")) == "open_failed"
    noise = np.random.default_rng(0).bytes(20000)
    assert reason(file("noise.mp4", noise)) == "open_failed"


def test_a_playlist_cannot_make_the_packer_read_another_file(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    target = write_video(tmp_path / "target.ts", **MP4)
    segments = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1.0,\n{target}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(segments)
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {target.name}\n")
    assert reason(tmp_path / "playlist.mp4") == "open_failed"
    assert reason(tmp_path / "concat.mp4") == "open_failed"


def test_the_content_and_not_the_name_is_looked_at(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "クリップ éñ 🎵.webm", container="mp4", **MP4)
    assert len(decode(path).frames) == 10
    unusual = path.rename(tmp_path / "concat:http:a.b%20c.txt")
    assert len(decode(unusual).frames) == 10


def test_a_file_needs_both_sound_and_video(tmp_path: Path, write_video: WriteVideo) -> None:
    nothing = np.zeros(0, np.int16)
    assert reason(write_video(tmp_path / "a.mp4", sound=nothing, **MP4)) == "no_audio"
    assert reason(write_video(tmp_path / "v.mp4", frames=[], **MP4)) == "no_video"


def test_a_cover_picture_is_no_video(tmp_path: Path, write_video: WriteVideo) -> None:
    path = tmp_path / "song.flac"
    cover = io.BytesIO()
    Image.new("RGB", (64, 48)).save(cover, "JPEG")
    path.write_bytes(_with_picture(encode_audio(tone(440, 1), "flac"), cover.getvalue()))
    with av.open(str(path)) as container:
        assert container.streams.video, "the cover is not seen at all"
    assert reason(path) in ("no_video", "open_failed")


def _with_picture(flac: bytes, jpeg: bytes) -> bytes:
    """A FLAC file with a PICTURE block after its first one (RFC 9639, section 8.8)."""
    mime = b"image/jpeg"
    block = struct.pack(">II", 3, len(mime)) + mime + struct.pack(">I", 0)
    block += struct.pack(">IIIII", 64, 48, 24, 0, len(jpeg)) + jpeg
    first = 8 + int.from_bytes(flac[5:8], "big")
    return flac[:first] + bytes([6]) + len(block).to_bytes(3, "big") + block + flac[first:]


def test_clips_under_the_minimum_are_too_short(tmp_path: Path, write_video: WriteVideo) -> None:
    pictures = [np.full((48, 64, 3), 90, np.uint8)] * 3
    path = write_video(tmp_path / "v.mkv", frames=pictures, sound=tone(440, 0.3))
    assert reason(path) == "too_short"
    assert len(decode(path, min_seconds=0.25).audio) == 4800


def test_a_clip_that_needs_too_much_memory_is_refused(
    tmp_path: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video_track, "MAXIMUM_CLIP_BYTES", 5 * 64 * 48 * 3 // 2)
    path = write_video(tmp_path / "v.mkv")
    assert reason(path) == "too_large"
    assert len(decode(path, video_fps=5).frames) == 5


def test_a_picture_of_absurd_size_is_not_decoded(
    tmp_path: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cavmae.dataloaders.media.decode_clip.MAXIMUM_SOURCE_PIXELS", 64 * 48 - 1)
    assert reason(write_video(tmp_path / "v.mp4", **MP4)) == "decode_error"


def test_a_file_whose_index_is_cut_off_does_not_open(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    path = write_video(tmp_path / "v.mp4", **MP4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    assert reason(path) == "open_failed"


@pytest.fixture
def long_mp4(tmp_path: Path, write_video: WriteVideo) -> Path:
    """3 s, index in front, pictures that cost bytes."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (48, 64, 3)).astype(np.uint8) for _ in range(30)]
    noise = random.integers(-9000, 9000, 48000).astype(np.int16)
    options = {"movflags": "faststart"}
    return write_video(tmp_path / "v.mp4", frames=pictures, sound=noise, options=options, **MP4)


def test_what_a_cut_off_file_still_holds_is_used_and_noted(long_mp4: Path) -> None:
    long_mp4.write_bytes(long_mp4.read_bytes()[: long_mp4.stat().st_size * 6 // 10])
    clip = decode(long_mp4)
    assert 10 <= len(clip.frames) < 25
    assert clip.decode_errors >= 1


def test_a_file_cut_off_near_its_start_is_refused(long_mp4: Path) -> None:
    data = long_mp4.read_bytes()
    long_mp4.write_bytes(data[: data.index(b"mdat") + len(data) // 10])
    assert reason(long_mp4) in ("short_read", "decode_error")


def test_damage_in_the_middle_costs_only_the_damaged_frames(long_mp4: Path) -> None:
    data = bytearray(long_mp4.read_bytes())
    for at in range(len(data) * 45 // 100, len(data) * 55 // 100):
        data[at] ^= 0x5A
    long_mp4.write_bytes(data)
    clip = decode(long_mp4)
    assert clip.decode_errors > 0
    assert 10 <= len(clip.frames) < 30
    assert clip.times_seconds[-1] == pytest.approx(2.9, abs=0.11)
    assert len(clip.audio) == pytest.approx(48000, abs=3000)


def test_damage_outside_the_window_is_no_fault_of_a_clip(long_mp4: Path) -> None:
    data = bytearray(long_mp4.read_bytes())
    for at in range(len(data) * 45 // 100, len(data) * 55 // 100):
        data[at] ^= 0x5A
    long_mp4.write_bytes(data)
    assert decode(long_mp4).decode_errors > 0
    assert decode(long_mp4, 0.0, 1.0).decode_errors == 0
    assert decode(long_mp4, 2.2, 2.9).decode_errors == 0


def test_frames_left_out_on_purpose_do_not_count_against_a_damaged_clip(long_mp4: Path) -> None:
    data = bytearray(long_mp4.read_bytes())
    for at in range(len(data) * 45 // 100, len(data) * 65 // 100):
        data[at] ^= 0x5A
    long_mp4.write_bytes(data)
    assert len(decode(long_mp4, video_fps=1).frames) in (2, 3)


def test_a_file_that_is_damaged_throughout_is_refused(long_mp4: Path) -> None:
    data = bytearray(long_mp4.read_bytes())
    start = data.index(b"mdat") + 4
    random = np.random.default_rng(1)
    data[start:] = random.bytes(len(data) - start)
    long_mp4.write_bytes(data)
    assert reason(long_mp4) == "decode_error"


# ------------------------------------------------------------------------------------- real clips


def test_every_file_of_a_set_of_damaged_videos_is_judged_as_expected(shared_clips: Path) -> None:
    folder = shared_clips / "clips_bad"
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["file"].endswith(".tar")]
    assert len(rows) > 30
    wrong = []
    for row in rows:
        try:
            clip = decode(folder / row["file"])
            found = "ok_partial" if clip.decode_errors else "ok"
        except ClipError as error:
            found = f"skip {error.reason}"
        expected = {"skip": f"skip {row['reason']}"}.get(row["expect"], row["expect"])
        if found != expected:
            wrong.append((row["file"], expected, found))
    assert not wrong


def test_frames_cut_by_an_edit_list_are_not_shown(shared_clips: Path) -> None:
    clip = decode(shared_clips / "clips" / "cavmae_tinkering.mp4", short_side=64)
    assert len(clip.frames) == 299


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cavmae_flute_guitar.mp4", "00W1lcxW-WU_40.000"),
        ("cavmae_tinkering.mp4", "KlsG1EnBEjc_000361"),
    ],
)
def test_the_first_channel_is_the_published_waveform(
    shared_clips: Path, name: str, reference: str
) -> None:
    path = shared_clips / "clips" / name
    clip = decode(path, 0, 11, audio_channel="first", video_fps=1, short_side=64)
    flac = shared_clips / "golden" / "preprocess" / f"{reference}.flac"
    with av.open(str(flac)) as container:
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    published = np.concatenate(frames, axis=1)[0]
    assert len(clip.audio) == len(published)
    assert np.abs(clip.audio.astype(int) - published).max() <= 1


def test_seeking_far_into_a_file_finds_what_reading_it_through_finds(shared_clips: Path) -> None:
    path = shared_clips / "clips" / "sync_test.mp4"
    sought, whole = decode(path, 20, 25, short_side=32), decode(path, 0, 25, short_side=32)
    assert len(sought.frames) == 150
    for one, other in zip(sought.frames, whole.frames[600:], strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(sought.audio[100:], whole.audio[-len(sought.audio) + 100 :])


def test_flash_and_beep_of_a_synchronisation_test_coincide(shared_clips: Path) -> None:
    clip = decode(shared_clips / "clips" / "sync_test.mp4", 20, 26, short_side=32)
    brightness = np.array([frame[: clip.height].mean() for frame in clip.frames])
    flashes = np.array(clip.times_seconds)[1:][np.diff(brightness) > 5]
    power = np.convolve(clip.audio.astype(float) ** 2, np.ones(160) / 160, "same")
    beeps = np.flatnonzero((power[1:] > 1e6) & (power[:-1] <= 1e6)) / 16000
    assert len(beeps) == 6
    for beep in beeps:
        assert np.abs(flashes - beep).min() < 0.034, f"no flash at {beep} s"


@pytest.mark.slow
def test_any_moment_of_real_clips_can_be_decoded_alone(shared_clips: Path) -> None:
    for path in sorted((shared_clips / "clips").iterdir()):
        if path.suffix != ".csv":
            clip = decode(path, 0, 4, short_side=64)
            assert_any_moment_is_what_the_whole_clip_shows(path, clip)
