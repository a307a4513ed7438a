"""Synthetic clips: what picture and sound share, and what they do not."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from cavmae.dataloaders.media.decode_clip import decode_clip
from cavmae.dataloaders.media.errors import DecodeSettings
from cavmae.dataloaders.tools import synthetic
from cavmae.dataloaders.tools.synthetic import (
    CLASSES,
    LOWEST_PITCH_HZ,
    MOTIONS,
    PITCH_OCTAVES,
    SHAPES,
    VOICE_INTERVAL,
    Latents,
    generate,
    latents,
    render_audio,
    render_frames,
)


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def hidden(**change: object) -> Latents:
    values = {
        "shape": "disc",
        "motion": "bounce",
        "size": 0.5,
        "hue": 0.5,
        "objects": 1,
        "events_seconds": (-0.5, 0.0, 0.5, 1.0, 1.5, 2.0),
    }
    return Latents(**{**values, **change})  # type: ignore[arg-type]


def loudest_hertz(audio: np.ndarray, low: float = 20, high: float = 8000) -> float:
    power = np.abs(np.fft.rfft(audio.astype(float) * np.hanning(len(audio)))) ** 2
    hertz = np.fft.rfftfreq(len(audio), 1 / 16000)
    power[(hertz < low) | (hertz > high)] = 0
    return float(hertz[np.argmax(power)])


def test_a_clip_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    generate(tmp_path / "all", 20, seed=5, workers=2)
    generate(tmp_path / "some", 3, seed=5, start_index=17, workers=1)
    generate(tmp_path / "other", 3, seed=6, start_index=17, workers=1)
    everything, some, other = (hashes(tmp_path / name) for name in ("all", "some", "other"))
    for name in ("000017.mp4", "000018.mp4", "000019.mp4"):
        assert some[name] == everything[name]
        assert other[name] != everything[name]


def test_the_files_are_videos_with_sound_of_the_stated_size(tmp_path: Path) -> None:
    listing = generate(tmp_path, 2, seed=0, size=48, fps=10, seconds=1.5, workers=1)
    with open(listing, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["000000.mp4", "000001.mp4"]
    for row in rows:
        assert row["labels"] in CLASSES
        clip = decode_clip(str(tmp_path / row["path"]), 0, 10, DecodeSettings())
        assert (clip.width, clip.height, len(clip.frames)) == (48, 48, 15)
        assert clip.times_seconds == pytest.approx([i / 10 for i in range(15)], abs=1e-3)
        assert len(clip.audio) == pytest.approx(24000, abs=1024)


def test_all_classes_and_numbers_of_objects_come_about_equally_often() -> None:
    clips = [latents(0, index) for index in range(2000)]
    labels = [clip.label for clip in clips]
    assert len(CLASSES) == len(SHAPES) * len(MOTIONS) == 20
    for name in CLASSES:
        assert 60 < labels.count(name) < 140
    for number in (1, 2, 3):
        assert 560 < [clip.objects for clip in clips].count(number) < 780


def test_nothing_is_drawn_outside_the_box_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [(latents(3, index), 3, index) for index in range(60)]
    drawn = [render_frames(*clip) for clip in clips]
    monkeypatch.setattr(synthetic, "_box", lambda *_: (slice(None), slice(None)))
    assert all(
        np.array_equal(render_frames(*clip), box) for clip, box in zip(clips, drawn, strict=True)
    )


def test_events_cover_the_clip() -> None:
    for index in range(200):
        events = np.array(latents(1, index).events_seconds)
        assert events[0] < 0 < 2.0 < events[-1]
        assert np.diff(events).min() > 0.2 and np.diff(events).max() < 0.9


def test_bigger_is_lower() -> None:
    """3.6 octaves between the smallest and the biggest disc."""
    pitches, areas = [], []
    for size in (0.0, 0.25, 0.5, 0.75, 1.0):
        clip = hidden(size=size, motion="jump", hue=1.0)
        pitches.append(loudest_hertz(render_audio(clip, 0, 0), 90, 2500))
        frame = render_frames(clip, 0, 0)[3].astype(int)
        areas.append(int((np.ptp(frame, axis=2) > 90).sum()))  # a pure colour on a dull one
    assert pitches == sorted(pitches, reverse=True)
    assert np.log2(pitches[0] / pitches[-1]) == pytest.approx(3.6, abs=0.1)
    assert areas == sorted(areas) and areas[-1] > 4 * areas[0]


def test_hue_moves_the_noise_band() -> None:
    """Red strikes near 300 Hz, violet near 5.5 kHz; the pitch stays below 200 Hz."""
    centres = []
    for hue in (0.6, 0.8, 1.0):
        clip = hidden(hue=hue, size=1.0)
        centres.append(np.log2(loudest_hertz(render_audio(clip, 0, 0), 1400)))
    assert np.diff(centres).min() > 0.3


def test_hue_does_not_wrap_from_violet_to_red() -> None:
    colours = []
    for hue in (0.0, 1.0):
        frame = render_frames(hidden(hue=hue, size=1.0), 0, 0)[0].astype(int)
        bright = frame.max(axis=2) - frame.min(axis=2)
        colours.append(frame[bright > bright.max() * 0.8].mean(axis=0))
    red, violet = colours
    assert red[0] > 2 * red[2] and violet[2] > 1.3 * violet[0]


@pytest.mark.parametrize("motion", ["bounce", "pulse", "jump"])
def test_sounds_begin_at_the_events(motion: str) -> None:
    audio = render_audio(hidden(motion=motion, hue=0.8), 0, 0).astype(float)
    energy = np.convolve(audio**2, np.ones(320), "same")[::16]  # each millisecond
    for event in (500, 1000, 1500):
        assert energy[event + 10 : event + 30].mean() > 2 * energy[event - 40 : event - 15].mean()


def test_a_bouncing_object_is_lowest_at_the_events() -> None:
    frames = render_frames(hidden(hue=0.0, size=0.6), 3, 0, size=64, fps=40).astype(int)
    heights = []
    for frame in frames:
        saturation = frame[..., 0] - frame[..., 2]
        heights.append(np.flatnonzero((saturation > 0.8 * saturation.max()).any(axis=1))[-1])
    for event in (20, 40, 60):
        assert heights[event] > heights[event - 10] + 10
        assert heights[event] > heights[event + 10] + 10


def test_a_single_frame_shows_the_motion_by_its_trail() -> None:
    still = render_frames(hidden(motion="jump", size=0.3), 0, 0, fps=40)[19]
    moving = render_frames(hidden(motion="bounce", size=0.3), 0, 0, fps=40)[12]

    def coloured(frame: np.ndarray) -> int:
        return int((np.ptp(frame.astype(int), axis=2) > 45).sum())

    assert coloured(moving) > 1.5 * coloured(still)


def test_more_objects_are_more_voices() -> None:
    def partials(objects: int) -> int:
        audio = render_audio(hidden(objects=objects, motion="jump", hue=1.0), 0, 0)
        power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
        hertz = np.fft.rfftfreq(len(audio), 1 / 16000)
        pitch = LOWEST_PITCH_HZ * 2 ** (PITCH_OCTAVES / 2)
        voices = [pitch * VOICE_INTERVAL**number for number in range(3)]
        peaks = [power[np.abs(hertz - voice) < 6].max() for voice in voices]
        return sum(peak > 0.05 * max(peaks) for peak in peaks)

    assert [partials(objects) for objects in (1, 2, 3)] == [1, 2, 3]


def test_nothing_else_in_the_picture_tells_of_the_sound() -> None:
    """The same latents with another nuisance differ; nuisance of picture and sound is separate."""
    clip = hidden()
    one, other = render_frames(clip, 0, 1), render_frames(clip, 0, 2)
    assert np.abs(one.astype(int) - other).mean() > 3
    corner = [render_frames(clip, 0, index)[:, :6, :6].mean() for index in range(60)]
    gain = [np.abs(render_audio(clip, 0, index).astype(int)).max() for index in range(60)]
    assert abs(np.corrcoef(corner, gain)[0, 1]) < 0.35


def test_shuffled_pairs_give_every_clip_the_sound_of_another(tmp_path: Path) -> None:
    paired = generate(tmp_path / "paired", 12, seed=2, workers=1)
    shuffled = generate(tmp_path / "shuffled", 12, seed=2, shuffled_pairs=True, workers=1)
    assert paired.read_text() == shuffled.read_text()  # labels are those of the picture
    sounds, others = [], []
    for index in range(12):
        name = f"{index:06d}.mp4"
        one = decode_clip(str(tmp_path / "paired" / name), 0, 10, DecodeSettings())
        other = decode_clip(str(tmp_path / "shuffled" / name), 0, 10, DecodeSettings())
        np.testing.assert_array_equal(np.stack(one.frames), np.stack(other.frames))
        sounds.append(one.audio.tobytes())
        others.append(other.audio.tobytes())
    assert sorted(sounds) == sorted(others)
    assert all(one != other for one, other in zip(sounds, others, strict=True))


def test_arguments_out_of_range_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count is 0"):
        generate(tmp_path, 0, seed=0)
    with pytest.raises(ValueError, match="size is 63"):
        generate(tmp_path, 1, seed=0, size=63)
