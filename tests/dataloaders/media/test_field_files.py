"""Files that people really have: each is decoded right, or refused for the reason that is true."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
import pytest
from av.video.reformatter import Colorspace, VideoReformatter

from cavmae.dataloaders.media import video_track
from cavmae.dataloaders.media.decode_clip import DecodedClip, decode_clip
from cavmae.dataloaders.media.encode_video import encode_video
from cavmae.dataloaders.media.errors import ClipError, DecodeSettings
from cavmae.dataloaders.media.tone_map import HLG, PQ, tone_map
from cavmae.dataloaders.packing.pack_clip import ten_frames

pytestmark = pytest.mark.field

WriteVideo = Callable[..., Path]
H264 = {"codec": "libx264", "pixel_format": "yuv420p", "sound_codec": "aac"}


def decode(path: Path, start: float = 0.0, end: float = 10.0, **settings: object) -> DecodedClip:
    return decode_clip(str(path), start, end, DecodeSettings(**settings))  # type: ignore[arg-type]


def tone(seconds: float, hz: int, channels: int) -> np.ndarray:
    wave = 9000 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * hz)) / hz)
    return np.tile(wave.astype(np.int16)[:, None], (1, channels))


def power(clip: DecodedClip) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(clip.audio[1600:-1600].astype(float) ** 2)))


# ------------------------------------------------------------------------------- shared real files

FIELD = {
    # file: width, height, frames, first and last time, seconds of sound; or the reason
    "editlist_video_1s_late.mp4": "silent_audio",
    "iphone_trim_nosync.mp4": (256, 454, 58, 0.0, 1.968, 2.26),
    "hdr10_in_sdr_container.mp4": (454, 256, 28, 0.0, 0.984, 1.003),
    "hdr10_av1_portrait.mp4": (256, 454, 127, 0.0, 4.204, 4.202),
    "rotate_and_reflect.mp4": (256, 384, 30, 0.0, 0.968, 1.089),
    "empty_second_video_track.mp4": (384, 256, 30, 0.0, 0.968, 1.089),
    "audio_without_stsd.mp4": "decode_error",
    "encrypted_piff.mp4": "decode_error",
    "partially_fragmented.mp4": (384, 256, 30, 0.067, 1.034, 1.156),
    "mdat_too_long.mp4": (384, 256, 30, 0.0, 0.968, 1.089),
    "samsung_slow_motion.mp4": (320, 240, 63, 0.0, 2.067, 2.152),
    "odd_crop_518x488.mp4": (270, 256, 167, 0.0, 5.555, 5.572),
    "mkv_1000fps.mkv": (384, 256, 30, 0.0, 0.967, 1.072),
    "ts_no_frame_rate.ts": (454, 256, 58, 0.0, 2.458, 2.432),
    "hls_init_only.mp4": "no_video",
    "silent_black.mp4": "silent_audio",
    "timebase_29917.mp4": (340, 256, 30, 0.0, 0.969, 1.022),
    "ts_hlg_8bit.ts": (256, 256, 298, 0.021, 4.971, 4.992),
    "ts_no_aud_cut.ts": "too_short",
    "vfr_screen_recording.mp4": "no_audio",
    "sar_1280_1281.mp4": (454, 256, 225, 0.0, 8.96, 9.008),
    "annexb_truncated.mp4": "no_audio",
    "decord_corrupted.mp4": "no_audio",
    "pancake_opus.mkv": (426, 240, 300, 0.0, 9.967, 10.0),
}


@pytest.mark.parametrize("name", FIELD)
def test_real_files_have_their_right_outcome(name: str, shared_clips: Path) -> None:
    expected = FIELD[name]
    path = shared_clips / "clips_field" / name
    if isinstance(expected, str):
        with pytest.raises(ClipError) as caught:
            decode(path)
        assert caught.value.reason == expected
        return
    clip = decode(path)
    width, height, frames, first, last, seconds = expected
    assert (clip.width, clip.height, len(clip.frames)) == (width, height, frames)
    assert clip.times_seconds[0] == pytest.approx(first, abs=0.002)
    assert clip.times_seconds[-1] == pytest.approx(last, abs=0.002)
    assert len(clip.audio) / 16000 == pytest.approx(seconds, abs=0.003)
    assert clip.decode_errors == 0


def test_video_that_an_edit_list_delays_begins_late(shared_clips: Path) -> None:
    clip = decode(shared_clips / "clips_field" / "editlist_video_1s_late.mp4", keep_silent=True)
    assert len(clip.frames) == 270 and clip.times_seconds[0] == pytest.approx(1.0, abs=0.01)
    assert len(clip.audio) == 160000


def test_joined_transport_streams_give_the_frames_of_both(shared_clips: Path) -> None:
    path = shared_clips / "field_cases/07-cat-ts/joined.ts"
    clip = decode(path)
    assert len(clip.frames) == 40 and len(clip.audio) / 16000 == pytest.approx(4.0, abs=0.05)
    assert len(decode(path, 2.5, 3.5).audio) == 16000


def longest_silence(audio: np.ndarray) -> float:
    """Seconds, without the ends."""
    heard = np.nonzero(np.abs(audio.astype(int)) > 3)[0]
    return float(np.diff(heard).max()) / 16000


def test_wobbling_stamps_cut_no_holes(shared_clips: Path) -> None:
    folder = shared_clips / "field_cases/09-pts-wobble"
    for name in ("wobble_16ms.mkv", "wobble_21ms.mkv"):
        assert longest_silence(decode(folder / name).audio) < 0.001
    assert longest_silence(decode(folder / "dropout_300ms.mkv").audio) == pytest.approx(
        0.3, abs=0.01
    )


# -------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_picture_shown_for_long_is_a_video_of_one_frame(
    codec: str, tmp_path: Path, write_video: WriteVideo
) -> None:
    """As podcasts and lectures are: the decoder holds the one picture back until it is drained."""
    path = write_video(
        tmp_path / "v.mp4",
        frames=[np.full((48, 64, 3), 90, np.uint8), np.full((48, 64, 3), 200, np.uint8)],
        times=[0.0, 90.0],
        sound=tone(100, 8000, 1)[:, 0],
        sound_hz=8000,
        codec=codec,
        pixel_format="yuv420p",
        sound_codec="aac",
    )
    for start in (0.0, 40.0, 80.0):
        clip = decode(path, start, start + 10)
        assert (len(clip.frames), len(clip.audio)) == (1, 160000)
        assert clip.decode_errors == 0 and clip.video_seconds == pytest.approx(10, abs=0.01)
    assert (
        len(encode_video(clip.frames, (clip.width, clip.height), "mjpeg", clip.frames_per_second))
        > 1000
    )


def test_the_only_picture_of_a_video_is_found(tmp_path: Path, write_video: WriteVideo) -> None:
    """Nothing follows that would make the decoder give it, and reading stops before the end."""
    path = write_video(
        tmp_path / "v.mp4",
        frames=[np.full((48, 64, 3), 90, np.uint8)],
        sound=tone(100, 8000, 1)[:, 0],
        sound_hz=8000,
        codec_options={"bf": "2"},
        **H264,
    )
    clip = decode(path)
    assert (len(clip.frames), len(clip.audio), clip.decode_errors) == (1, 160000, 0)


def test_a_rate_that_no_video_has_is_not_believed(tmp_path: Path, write_video: WriteVideo) -> None:
    frames = [np.full((48, 64, 3), 90, np.uint8)] * 3
    clip = decode(write_video(tmp_path / "v.mkv", frames=frames, times=[0.0, 0.4, 0.8]))
    for rate in (0.0, 1 / 3000, 1e9, clip.frames_per_second):
        assert len(encode_video(clip.frames, (clip.width, clip.height), "mjpeg", rate)) > 1000


def test_ten_frames_of_a_long_clip_are_found_without_keeping_all(
    tmp_path: Path, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(times: list[float], seconds: float, rate: float) -> list[int]:
        return ten_frames(times, seconds, rate, "by_time")

    pictures = [np.full((48, 64, 3), 20 + 2 * number, np.uint8) for number in range(100)]
    path = write_video(tmp_path / "v.mkv", frames=pictures, sound=tone(10, 16000, 1)[:, 0])
    whole = decode(path)
    monkeypatch.setattr(video_track, "DROPPABLE_BYTES", 50_000)
    some = decode_clip(str(path), 0.0, 10.0, DecodeSettings(), choose=choose)
    chosen = choose(whole.times_seconds, whole.video_seconds, whole.frames_per_second)
    assert some.frame_indexes == sorted(set(chosen)) and len(some.frames) == 10
    for index, frame in zip(some.frame_indexes, some.frames, strict=True):
        np.testing.assert_array_equal(frame, whole.frames[index])
    assert (some.times_seconds, some.content) == (whole.times_seconds, whole.content)


# ------------------------------------------------------------------------------------------- sound


def test_nine_channels_and_ambisonic_sound_are_sound(shared_clips: Path) -> None:
    for name in ("nine_channels.mkv", "foa.webm"):
        for channel in ("mix", "first"):
            path = shared_clips / "field_cases/04-ambisonic" / name
            assert power(decode(path, audio_channel=channel)) > 2000


def test_channels_of_no_known_layout_are_averaged(tmp_path: Path, write_video: WriteVideo) -> None:
    sound = tone(1.0, 16000, 9)
    sound[:, 5:] = 0
    path = write_video(tmp_path / "v.mkv", sound=sound, layout="9 channels")
    assert power(decode(path)) == pytest.approx(9000 / 2**0.5 * 5 / 9, rel=0.02)


def test_a_sample_rate_that_no_sound_has_is_named(tmp_path: Path, write_video: WriteVideo) -> None:
    path = write_video(tmp_path / "v.mkv", sound=tone(1.0, 16000, 1)[:, 0], sound_hz=16)
    with pytest.raises(ClipError, match="decode_error: its header states 16 samples per second"):
        decode(path)


def test_stereo_in_opposite_phase_is_not_silence(tmp_path: Path, write_video: WriteVideo) -> None:
    sound = tone(1.0, 16000, 2) * np.array([[1, -1]], np.int16)
    clip = decode(write_video(tmp_path / "v.mkv", sound=sound, layout="stereo"))
    assert power(clip) == pytest.approx(9000 / 2**0.5, rel=0.02)
    assert clip.timing == {"opposite_phase": pytest.approx(1.0)}


def test_a_short_file_with_one_bad_packet_is_too_short(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    pictures = [np.full((48, 64, 3), 90, np.uint8)] * 10
    path = write_video(
        tmp_path / "v.mkv",
        frames=pictures,
        sound=tone(0.3, 16000, 1)[:, 0],
        codec="mjpeg",
        pixel_format="yuvj420p",
    )
    data = bytearray(path.read_bytes())
    third = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"][3]
    data[third : third + 4] = b"\x00\x00\x00\x00"
    path.write_bytes(data)
    with pytest.raises(ClipError) as caught:
        decode(path)
    assert caught.value.reason == "too_short"


# ------------------------------------------------------------------------------------------ pixels


def test_video_in_hd_that_states_no_matrix_is_bt_709() -> None:
    for size, matrix in (((1280, 720), Colorspace.ITU709), ((640, 360), Colorspace.ITU601)):
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[:] = (30, 180, 60)
        frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(
            format="yuv420p", dst_colorspace=matrix, dst_color_range="MPEG"
        )
        frame.colorspace = video_track.UNSPECIFIED
        reformatter = VideoReformatter()
        planes = video_track.scale_frame(frame, 64, 36, reformatter)
        stored = av.VideoFrame.from_ndarray(planes, "yuv420p")
        found = video_track.rgb_pixels(stored, reformatter).mean(axis=(0, 1))
        assert found == pytest.approx([30, 180, 60], abs=2)


def pq(light: float) -> int:
    """16-bit PQ value of a light in cd/m2 (SMPTE ST 2084)."""
    power = (light / 10000) ** 0.1593017578125
    value = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    return round(65535 * value)


def test_hdr_is_mapped_as_ffmpegs_mobius_does() -> None:
    """Numbers by hand from `vf_tonemap.c`: peak 1000 / 203, knee 0.3, display gamma 2.4."""
    lights = [0.0, 203 * 0.1, 203 * 0.3, 203.0, 1000.0, 4000.0]
    rgb = np.array([[[pq(light)] * 3 for light in lights]], np.uint16)
    mapped = tone_map(rgb, PQ)
    assert np.ptp(mapped, axis=2).max() <= 1, "grey stays grey"
    expected = [0, 98, 154, 217, 255, 255]
    assert mapped[0, :, 0].astype(int) == pytest.approx(expected, abs=1)


def test_hlg_keeps_the_order_of_its_greys() -> None:
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None, :, None], 3, axis=2)
    mapped = tone_map(ramp, HLG)[0, :, 0].astype(int)
    assert mapped[0] == 0 and mapped[-1] == 255 and (np.diff(mapped) >= 0).all()
    assert 190 < mapped[48] < 230, "three quarters of HLG is diffuse white"


def test_interlaced_frames_are_deinterlaced(tmp_path: Path) -> None:
    """A bar moves between the two fields of each frame: combed lines, unless it is undone."""
    with av.open(str(tmp_path / "v.mpg"), "w", format="vob") as output:
        video = output.add_stream(
            "mpeg2video", rate=25, options={"flags": "+ildct+ilme", "top": "1"}
        )
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt, video.bit_rate = 128, 96, "yuv420p", 4_000_000
        audio = output.add_stream("mp2", rate=48000)
        assert isinstance(audio, av.AudioStream)
        audio.layout = "mono"
        marked = av.filter.Graph()
        source = marked.add_buffer(
            width=128, height=96, format=av.VideoFormat("yuv420p"), time_base=Fraction(1, 25)
        )
        marked.link_nodes(source, marked.add("setfield", "tff"), marked.add("buffersink"))
        marked.configure()
        for number in range(25):
            picture = np.full((96, 128, 3), 30, np.uint8)
            for field in (0, 1):
                left = 8 * number // 2 * 2 % 96 + 16 * field
                picture[field::2, left : left + 16] = 220
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            marked.vpush(frame)
            output.mux(video.encode(marked.vpull()))
        output.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone(1.0, 48000, 1).T.copy(), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        output.mux([packet for packet in audio.encode(frame)] + list(audio.encode(None)))
    clip = decode(tmp_path / "v.mpg")
    luma = np.stack([frame[:96].astype(float) for frame in clip.frames])
    combed = np.abs(luma[:, 1:-1] - (luma[:, :-2] + luma[:, 2:]) / 2).mean()
    assert combed < 4, "without it about 30"
    assert len(clip.frames) == 25 and np.diff(clip.times_seconds) == pytest.approx(0.04, abs=0.001)


def test_hidden_colours_of_transparent_video_are_not_shown(tmp_path: Path) -> None:
    rgba = np.zeros((48, 64, 4), np.uint8)
    rgba[:, :32] = (255, 0, 0, 0)
    rgba[:, 32:] = (0, 0, 255, 255)
    frame = av.VideoFrame.from_ndarray(rgba, "rgba")
    planes = video_track.scale_frame(frame, 64, 48, VideoReformatter())
    found = video_track.rgb_pixels(
        av.VideoFrame.from_ndarray(planes, "yuv420p"), VideoReformatter()
    )
    assert found[24, 8] == pytest.approx([255, 255, 255], abs=2)
    assert found[24, 56] == pytest.approx([0, 0, 255], abs=3)


def test_pixels_that_are_stated_to_be_absurdly_wide_are_square(
    tmp_path: Path, write_video: WriteVideo
) -> None:
    clip = decode(write_video(tmp_path / "v.mkv", pixel_aspect=Fraction(1, 1000)))
    assert (clip.width, clip.height) == (64, 48)


# ---------------------------------------------------------------------------------------- identity


def test_content_does_not_depend_on_settings(tmp_path: Path, write_video: WriteVideo) -> None:
    pictures = [np.full((48, 64, 3), 20 + number, np.uint8) for number in range(200)]
    sound = tone(20, 16000, 2)
    path = write_video(tmp_path / "v.mkv", frames=pictures, sound=sound, layout="stereo")
    content = decode(path).content
    for name, value in (("short_side", 32), ("video_fps", 2.0), ("audio_channel", "first")):
        assert decode(path, 0.0, 10.0, **{name: value}).content == content
    assert decode(path, 10, 20).content != content
