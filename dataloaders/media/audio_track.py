"""Decodes the audio of a clip: places it by timestamps, mixes it to mono, resamples it."""

import av
import numpy as np
from av.error import FFmpegError

from cavmae.dataloaders.constants import AUDIO_HZ
from cavmae.dataloaders.media.errors import (
    MAXIMUM_CLIP_BYTES,
    ClipError,
    DecodeSettings,
    error_text,
    within,
)

GAP_SECONDS = 0.03
"""Tolerance between a timestamp and the end of the samples before it (containers round timestamps,
to a millisecond or more); beyond it, gaps are filled with zeros and overlaps are dropped."""


class AudioTrack:
    """Collects the audio of a window as mono int16 at the stream's sample rate.

    Args:
        stream: the stream whose packets `decode` is given.
        zero: start of the window on the stream's timeline, seconds.
        length: seconds; may be infinite.
    """

    def __init__(
        self, stream: av.AudioStream, zero: float, length: float, settings: DecodeSettings
    ):
        self.zero = zero
        self.length = length
        self.settings = settings
        self.hz = stream.rate
        self.samples = 0
        """Samples from the start of the window to the end of the audio so far."""
        self.frames = 0
        """Number of decoded frames, in the window or not."""
        self.errors: list[str] = []
        """Packets of the window that failed."""
        self.done = False
        """Whether no further audio can belong to the window."""
        self.begins_late = False
        """Whether the first decoded audio comes after the start of the window."""
        self._parts: list[np.ndarray] = []
        self._resampler: av.AudioResampler | None = None
        self._source: tuple[str, str, int] | None = None
        self._clock: int | None = None

    def decode(self, packet: av.Packet) -> None:
        """Decode a packet of the stream; failures are added to `errors`.

        Raises:
            ClipError: the audio takes too much memory.
        """
        try:
            for frame in packet.decode():
                assert isinstance(frame, av.AudioFrame)
                if not self.done:
                    self._take(frame)
        except (FFmpegError, MemoryError) as error:
            if within(packet, self.zero, self.length):
                self.errors.append(error_text(error))

    def waveform(self) -> np.ndarray:
        """The collected audio, `(samples,)` int16 at 16 kHz."""
        return resample(np.concatenate([np.zeros(0, np.int16), *self._parts]), self.hz)

    def _take(self, frame: av.AudioFrame) -> None:
        self.hz = self.hz or frame.sample_rate
        source = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or source != self._source:
            self._source = source
            # s16 matters: libswresample scales a mix down for integers and not for floats.
            layout = "mono" if self.settings.audio_channel == "mix" else frame.layout.name
            self._resampler = av.AudioResampler(format="s16", layout=layout, rate=self.hz)
        position = self._clock
        if frame.pts is not None and frame.time_base is not None:
            stated = round((float(frame.pts * frame.time_base) - self.zero) * self.hz)
            if position is None or abs(stated - position) > GAP_SECONDS * self.hz:
                position = stated
        if position is None:  # Raw streams carry no times.
            position = round(-self.zero * self.hz)
        if self.frames == 0:
            self.begins_late = position > 0
        self.frames += 1
        for converted in self._resampler.resample(frame):
            mono = converted.to_ndarray().reshape(-1, converted.layout.nb_channels)[:, 0]
            self._place(mono, position)
            position += len(mono)
        self._clock = position
        self.done = position >= self.length * self.hz

    def _place(self, mono: np.ndarray, position: int) -> None:
        if position < self.samples:  # before the window, or an overlap
            mono = mono[self.samples - position :]
            position = self.samples
        end = self.length * self.hz
        if position + len(mono) > end:
            mono = mono[: max(0, round(end) - position)]
        if len(mono) == 0:
            return
        if (position + len(mono)) * 2 > MAXIMUM_CLIP_BYTES:
            raise ClipError("too_large", f"more than {MAXIMUM_CLIP_BYTES} bytes of audio")
        self._parts.append(np.zeros(position - self.samples, np.int16))
        self._parts.append(np.array(mono))
        self.samples = position + len(mono)


def resample(native: np.ndarray, hz: int) -> np.ndarray:
    """Resample `(samples,)` int16 at `hz` to 16 kHz, with ffmpeg's anti-aliasing filter."""
    if hz == AUDIO_HZ or len(native) == 0:
        return native
    samples = round(len(native) * AUDIO_HZ / hz)
    frame = av.AudioFrame.from_ndarray(native[np.newaxis], format="s16", layout="mono")
    frame.sample_rate = hz
    resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_HZ)
    parts = [part.to_ndarray()[0] for piece in (frame, None) for part in resampler.resample(piece)]
    converted = np.concatenate(parts)[:samples]
    return np.pad(converted, (0, samples - len(converted)))
