"""Encodes and decodes the stored audio of a sample: 16 kHz mono int16, FLAC or WAV.

FLAC takes about two thirds of the bytes, WAV next to no time to decode.
"""

import io
import wave
from typing import Literal

import av
import numpy as np

from cavmae.dataloaders.constants import AUDIO_HZ

AudioCodec = Literal["flac", "wav"]
"""One of `constants.AUDIO_CODECS`."""


def encode_audio(audio: np.ndarray, codec: AudioCodec) -> bytes:
    """Encode `(samples,)` int16 as a file; the same samples give the same bytes."""
    stream_of_bytes = io.BytesIO()
    if codec == "wav":
        with wave.open(stream_of_bytes, "wb") as target:
            target.setparams((1, 2, AUDIO_HZ, len(audio), "NONE", ""))
            target.writeframes(audio.astype("<i2").tobytes())
        return stream_of_bytes.getvalue()
    with av.open(stream_of_bytes, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=AUDIO_HZ, layout="mono", format="s16")
        frame = av.AudioFrame.from_ndarray(audio[np.newaxis], format="s16", layout="mono")
        frame.sample_rate = AUDIO_HZ
        frame.pts = 0
        for piece in (frame, None):
            container.mux(stream.encode(piece))
    return stream_of_bytes.getvalue()


def decode_audio(data: bytes) -> np.ndarray:
    """Decode a stored file to `(samples,)` int16.

    Raises:
        FFmpegError: the file does not decode.
    """
    with av.open(io.BytesIO(data), "r") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return np.concatenate(parts, dtype=np.int16) if parts else np.zeros(0, np.int16)
