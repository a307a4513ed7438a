"""Decodes the audio of a clip: mixes it to mono, places it by its time stamps, resamples it."""

import av
import numpy as np
from av.error import FFmpegError

from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.dataloaders.media.audio_layout import ANCHORS, AudioLayout, first_shift, lay_out
from cavmae.dataloaders.media.errors import (
    MAXIMUM_CLIP_BYTES,
    ClipError,
    DecodeSettings,
    error_text,
    within,
)

SURROUNDING_SECONDS = 2.5
"""Sound before a window whose stamps count for the place of the sound in it."""
FOLLOWING_SECONDS = 0.5
"""Sound after a window that is decoded for the same reason."""
MINIMUM_HZ, MAXIMUM_HZ = 1000, 1_000_000
"""Samples per second that a header can state."""
OPPOSITE_PHASE = 0.003
"""Below this share of the channels' mean power, a mix has lost what the channels hold."""


class AudioTrack:
    """Collects the audio of a window as mono int16.

    Args:
        stream: the stream whose packets `decode` is given.
        zero: start of the window on the stream's timeline, seconds.
        length: seconds; may be infinite.

    Raises:
        ClipError: the header states more audio than is kept.
    """

    def __init__(
        self, stream: av.AudioStream, zero: float, length: float, settings: DecodeSettings
    ):
        self.zero = zero
        self.length = length
        self.settings = settings
        self.hz = stream.rate
        """Samples per second; after `finish`, of the placed samples."""
        self.samples = 0
        """Samples from the start of the window to the end of the audio, after `finish`."""
        self.frames = 0
        """Number of decoded frames, in the window or not."""
        self.errors: list[str] = []
        """Packets of the window that failed."""
        self.done = False
        """Whether no further audio can belong to the window."""
        self.begins_late = False
        """Whether the first decoded audio comes after the start of the window, after `finish`."""
        self.faults: dict[str, float] = {}
        """What was done to fit the window's samples to their stamps: seconds by cause."""
        self._mixer: Mixer | None = None
        self._blocks: list[np.ndarray | None] = []
        """`(samples, columns)` int16: a mix, and the first channel of several; None: long before
        the window."""
        self._stated: list[float] = []
        self._lengths: list[int] = []
        self._decoded_samples = self._kept_bytes = 0
        self._anchors: list[float] = []
        self._placed = np.zeros((0, 1), np.int16)
        # STREAMINFO counts the samples; the length that others state may be a guess.
        if stream.container.format.name == "flac" and stream.duration and stream.time_base:
            stated = min(float(stream.duration * stream.time_base), length)
            if 2 * stated * self.hz > MAXIMUM_CLIP_BYTES:
                raise ClipError(
                    "too_large",
                    f"its header states {stated / 3600:.1f} h of audio, over {MAXIMUM_CLIP_BYTES} "
                    "bytes",
                )

    def decode(self, packet: av.Packet) -> None:
        """Decode a packet of the stream; failures are added to `errors`.

        Raises:
            ClipError: the audio takes too much memory, or cannot be mixed.
        """
        try:
            decoded = packet.decode()
        except (FFmpegError, MemoryError) as error:
            if within(packet, self.zero, self.length):
                self.errors.append(error_text(error))
            return
        for frame in decoded:
            assert isinstance(frame, av.AudioFrame)
            if not self.done:
                self._take(frame)

    def finish(self) -> None:
        """Place what was decoded."""
        if not self._blocks:
            return
        stated, lengths = np.array(self._stated), np.array(self._lengths)
        first = int(np.argmax(~(stated + lengths / self.hz < -SURROUNDING_SECONDS)))
        layout = lay_out(stated[first:], lengths[first:], self.hz)
        if layout.disagree and first:
            first, layout = 0, lay_out(stated, lengths, self.hz)
        self.begins_late = first == 0 and layout.positions[0] > 0
        self._place(layout, self._blocks[first:])
        seconds = self.samples / layout.hz
        if layout.hz != self.hz:
            self.faults["audio_stretched"] = abs(layout.hz / self.hz - 1) * seconds
        if layout.disagree:
            self.faults["stamps_disagree"] = seconds
        self.hz = layout.hz

    def waveform(self) -> np.ndarray:
        """The placed audio, `(samples,)` int16 at 16 kHz."""
        mix = self._placed[:, 0]
        if self._placed.shape[1] > 1:
            # Without a copy of all samples as floats, which take four times the memory.
            mix_power, power = np.einsum(
                "ij,ij->j", self._placed, self._placed, dtype=np.float64, casting="safe"
            )
            if mix_power < OPPOSITE_PHASE * power:
                self.faults["opposite_phase"] = self.samples / self.hz
                mix = self._placed[:, 1]
        return resample(mix, self.hz)

    def first_channel(self) -> bytes:
        """The placed samples of the first channel as they were decoded, after their rate."""
        return self.hz.to_bytes(4, "little") + self._placed[:, -1].tobytes()

    def _take(self, frame: av.AudioFrame) -> None:
        self.frames += 1
        self.hz = self.hz or frame.sample_rate
        if not MINIMUM_HZ <= self.hz <= MAXIMUM_HZ:
            raise ClipError("decode_error", f"its header states {self.hz} samples per second")
        if self._mixer is None or not self._mixer.fits(frame):
            self._mixer = Mixer(frame, self.hz, self.settings.audio_channel)
        samples = self._mixer.mix(frame)
        stated = float("nan")
        if frame.pts is not None and frame.time_base is not None:
            stated = float(frame.pts * frame.time_base) - self.zero
        elif not self._stated:
            stated = -self.zero  # Raw streams carry no times.
        heard = self._decoded_samples / self.hz
        if len(self._anchors) < ANCHORS and np.isfinite(stated):
            self._anchors.append(stated - heard)
        heard += first_shift(np.array(self._anchors))
        earliest, latest = np.fmin(heard, stated), np.fmax(heard, stated)
        keep = latest + len(samples) / self.hz > -SURROUNDING_SECONDS
        self._blocks.append(samples if keep else None)
        self._stated.append(stated)
        self._lengths.append(len(samples))
        self._decoded_samples += len(samples)
        self._kept_bytes += len(samples) * 2 * keep
        if self._kept_bytes > MAXIMUM_CLIP_BYTES:
            raise ClipError("too_large", f"more than {MAXIMUM_CLIP_BYTES} bytes of audio")
        self.done = bool(earliest >= self.length + FOLLOWING_SECONDS)

    def _place(self, layout: AudioLayout, blocks: list[np.ndarray | None]) -> None:
        parts, end, limit = [], 0, self.length * layout.hz
        filled = overlapping = 0
        runs = zip(layout.starts, [*layout.starts[1:], len(blocks)], layout.positions, strict=True)
        lengths = self._lengths[len(self._lengths) - len(blocks) :]
        columns = max((block.shape[1] for block in blocks if block is not None), default=1)
        for first, last, position in runs:
            overlapping += max(0, min(end - position, end)) if parts else 0
            for block, length in zip(blocks[first:last], lengths[first:last], strict=True):
                start, stop = max(position, end), int(min(position + length, limit))
                if block is not None and start < stop:
                    if parts:
                        filled += start - end
                    parts.append(np.zeros((start - end, columns), np.int16))
                    piece = block[start - position : stop - position]
                    parts.append(piece if piece.shape[1] == columns else piece[:, [0] * columns])
                    end = stop
                position += length
        if parts:
            self._placed = np.concatenate(parts)
        self.samples = end
        if filled:
            self.faults["audio_filled"] = filled / layout.hz
        if overlapping:
            self.faults["audio_overlapping"] = overlapping / layout.hz


class Mixer:
    """Mixes frames of one format to mono, beside their first channel.

    Known layouts are mixed with ffmpeg's gains, scaled down so that nothing clips; of ambisonic
    sound the omnidirectional channel (the first) is taken; all others are averaged.
    """

    def __init__(self, frame: av.AudioFrame, hz: int, channel: str):
        self._source = _format(frame)
        self._channels = frame.layout.nb_channels
        layout = frame.layout.name
        # s16 matters: libswresample scales a mix down for integers and not for floats.
        self._all = av.AudioResampler(format="s16", layout=layout, rate=hz)
        self._mono = None
        self._first_alone = (
            channel == "first" or self._channels == 1 or layout.startswith("ambisonic")
        )
        if not self._first_alone:
            self._mono = av.AudioResampler(format="s16", layout="mono", rate=hz)

    def fits(self, frame: av.AudioFrame) -> bool:
        return self._source == _format(frame)

    def mix(self, frame: av.AudioFrame) -> np.ndarray:
        """Mix a frame.

        Returns:
            `(samples, columns)` int16: the mix, then the first channel where there are several.

        Raises:
            ClipError: the layout of the channels cannot be read.
        """
        try:
            every = _samples(self._all.resample(frame), self._channels)
        except (FFmpegError, ValueError) as error:
            raise ClipError(
                "decode_error",
                f"{self._channels} channels of layout {self._source[1]!r} cannot be read: "
                f"{error_text(error)}",
            ) from error
        if self._first_alone:
            return every[:, :1]
        return np.concatenate([self._mix(frame, every), every[:, :1]], axis=1)

    def _mix(self, frame: av.AudioFrame, every: np.ndarray) -> np.ndarray:
        if self._mono is not None:
            try:
                return _samples(self._mono.resample(frame), 1)
            except (FFmpegError, ValueError):
                self._mono = None  # ffmpeg has no gains for this layout.
        return np.rint(every.mean(axis=1, keepdims=True)).astype(np.int16)


def _format(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _samples(frames: list[av.AudioFrame], channels: int) -> np.ndarray:
    parts = [frame.to_ndarray().reshape(-1, channels) for frame in frames]
    return np.concatenate([np.zeros((0, channels), np.int16), *parts])


def resample(native: np.ndarray, hz: int) -> np.ndarray:
    """Resample `(samples,)` int16 or float32 at `hz` to 16 kHz, with ffmpeg's anti-aliasing
    filter."""
    if hz == AUDIO_HZ or len(native) == 0:
        return np.ascontiguousarray(native)
    samples = round(len(native) * AUDIO_HZ / hz)
    kind = "s16" if native.dtype == np.int16 else "flt"
    frame = av.AudioFrame.from_ndarray(
        np.ascontiguousarray(native)[np.newaxis], format=kind, layout="mono"
    )
    frame.sample_rate = hz
    resampler = av.AudioResampler(format=kind, layout="mono", rate=AUDIO_HZ)
    parts = [part.to_ndarray()[0] for piece in (frame, None) for part in resampler.resample(piece)]
    converted = np.concatenate(parts)[:samples]
    return np.pad(converted, (0, samples - len(converted)))
