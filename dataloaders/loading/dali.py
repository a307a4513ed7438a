"""The only file that imports DALI: decodes clips to waveforms and normalised frames.

CPU and GPU share one graph. The readers draw everything random, so all operators here are
deterministic. The loader's thread feeds the pipeline batch by batch (`feed_input`); DALI's threads
decode one batch at a time, so that an error belongs to that batch. torch is imported only for a
GPU: without it, the processes that try suspicious clips start in a second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.types import Constant, DALIDataType, DALIImageType, DALIInterpType

from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.loading.reader import EncodedClip, ReaderSettings

_NOTHING = np.zeros(1, dtype=np.uint8)
_DEFAULTS = DataConfig()
_NO_PIXELS = np.zeros((1, 1, 1, 3), dtype=np.uint8)


class DecodeError(RuntimeError):
    """DALI failed to decode a batch; the decoder that raised this is no longer usable.

    Attributes:
        reason: `audio_undecodable`, `video_undecodable` or `undecodable`.
    """

    def __init__(self, detail: str):
        super().__init__(detail)
        self.reason = "undecodable"
        if "decoders.audio" in detail:
            self.reason = "audio_undecodable"
        elif "decoders." in detail:
            self.reason = "video_undecodable"


def error_line(text: str) -> str:
    """The line of a DALI error that says what happened, without the traceback around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line, following in pairwise(lines):
        if line == "encountered:":
            return following
    return lines[-1] if lines else ""


@dataclass
class DecodedClips:
    """One decoded batch."""

    waveforms: list[np.ndarray]
    """`(samples,)` int16 each, as long as the clip's audio; one 0 each if sound is not read."""
    frames: Any
    """`(batch, frames_per_clip, 3, image_size, image_size)` float32, ImageNet-normalised: a numpy
    array, or a torch tensor on the GPU; None if pictures are not read."""


class ClipDecoder:
    """Decodes batches of clips; call `schedule` and `collect` alternately.

    Args:
        jpegs: whether the frames are JPEGs; otherwise one-frame videos, or pixels.
        image_size: height and width of the decoded frames.
        maximum_batch: maximum number of clips in a batch.
        threads: decode that many frames at a time.
        config: what is read, frames of every clip, and how a GPU decodes JPEGs.
        gpu: index of the GPU that decodes the frames and keeps them; None: the CPU does. Audio is
            always decoded on the CPU.
    """

    def __init__(
        self,
        jpegs: bool,
        image_size: int,
        maximum_batch: int,
        threads: int,
        gpu: int | None,
        config: DataConfig = _DEFAULTS,
    ):
        self.jpegs = jpegs
        self.gpu = gpu
        self._hears, self._sees = "audio" in config.modalities, "video" in config.modalities
        self._rows_per_clip = config.frames_per_clip if self._sees else 1
        pictures: Any = partial(_image_graph, config=config) if jpegs else _video_graph
        on_gpu = gpu is not None
        graph: Any = partial(pictures, on_gpu=on_gpu, image_size=image_size)
        self._pipeline: Pipeline = (graph if self._sees else _audio_graph)(
            batch_size=maximum_batch * self._rows_per_clip,
            num_threads=threads,
            device_id=gpu,
            prefetch_queue_depth=1,
        )
        self._pipeline.build()

    @classmethod
    def of(cls, settings: ReaderSettings, maximum_batch: int, threads: int) -> "ClipDecoder":
        """Make the decoder of a loader's clips."""
        size, config = settings.shape.image_size, settings.config
        return cls(settings.jpegs, size, maximum_batch, threads, settings.gpu, config)

    def schedule(self, clips: Sequence[EncodedClip]) -> None:
        """Start decoding a batch without waiting for it."""
        feed = self._pipeline.feed_input
        frames = [(clip, number) for clip in clips for number in range(self._rows_per_clip)]
        # A row of the pipeline is a frame; a clip's audio goes with its first one.
        has_audio = [self._hears and number == 0 for _, number in frames]
        feed("has_audio", [np.bool_(has) for has in has_audio])
        audio = [_bytes(clip.audio) for clip, _ in frames]
        feed("audio", [one if has else _NOTHING for one, has in zip(audio, has_audio, strict=True)])
        if self._sees:
            self._feed_frames(frames)
        self._pipeline.schedule_run()

    def _feed_frames(self, frames: Sequence[tuple[EncodedClip, int]]) -> None:
        feed = self._pipeline.feed_input
        if not self.jpegs:
            pixels = [clip.pixels[number] if clip.pixels else None for clip, number in frames]
            feed("has_pixels", [np.bool_(one is not None) for one in pixels])
            feed("pixels", [_NO_PIXELS if one is None else one[None] for one in pixels])
        feed("encoded", [_bytes(clip.frames[number]) for clip, number in frames])
        feed("crop_start", [np.array(clip.crop[:2], dtype=np.float32) for clip, _ in frames])
        feed("crop_end", [np.array(clip.crop[2:], dtype=np.float32) for clip, _ in frames])
        feed("flipped", [np.array(clip.flipped, dtype=np.int32) for clip, _ in frames])

    def collect(self) -> DecodedClips:
        """Wait for the scheduled batch.

        Raises:
            DecodeError: the batch cannot be decoded.
        """
        try:
            waveforms, *frames = self._pipeline.outputs()
        except RuntimeError as error:
            raise DecodeError(str(error)) from error
        # A later batch overwrites DALI's memory.
        firsts = range(0, len(waveforms), self._rows_per_clip)
        return DecodedClips(
            [np.array(waveforms.at(row)).reshape(-1) for row in firsts],
            self._copied(*frames) if frames else None,
        )

    def _copied(self, frames: Any) -> Any:
        if self.gpu is None:
            copy = np.array(frames.as_array())
        else:
            import torch
            from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

            dense = frames.as_tensor()
            device = torch.device("cuda", self.gpu)
            copy = torch.empty(dense.shape(), dtype=torch.float32, device=device)
            feed_ndarray(dense, copy, cuda_stream=torch.cuda.current_stream(device))
        return copy.reshape(-1, self._rows_per_clip, *copy.shape[-3:])


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _source(name: str, dtype: Any, dimensions: int, layout: str | None = None) -> Any:
    return fn.external_source(name=name, dtype=dtype, ndim=dimensions, layout=layout)


def _waveform() -> Any:
    """Decode the audio of rows that have any; DALI makes conditionals of the `if` here too."""
    has_audio: Any = _source("has_audio", DALIDataType.BOOL, 0)
    audio = _source("audio", DALIDataType.UINT8, 1)
    if has_audio:
        waveform, _ = fn.decoders.audio(audio, dtype=DALIDataType.INT16, downmix=False)
    else:
        waveform = Constant(np.zeros((1, 1), dtype=np.int16), device="cpu")
    return waveform


def _to_input(image: Any, image_size: int, layout: str) -> Any:
    """Resize the crop like PIL (antialiased triangle filter, uint8 result), flip, normalise.

    The filter reaches beyond the edges of the crop: the center crop gives the result of resizing
    the whole image and cropping that.
    """
    resized: Any = fn.resize(
        image,
        size=(image_size, image_size),
        roi_start=_source("crop_start", DALIDataType.FLOAT, 1),
        roi_end=_source("crop_end", DALIDataType.FLOAT, 1),
        roi_relative=True,
        interp_type=DALIInterpType.INTERP_LINEAR,
        antialias=True,
    )
    return fn.crop_mirror_normalize(
        resized,
        mirror=_source("flipped", DALIDataType.INT32, 0),
        dtype=DALIDataType.FLOAT,
        output_layout=layout,
        mean=[255 * mean for mean in IMAGE_MEAN],
        std=[255 * std for std in IMAGE_STD],
    )


@pipeline_def(enable_conditionals=True)
def _audio_graph():
    return _waveform()


@pipeline_def(enable_conditionals=True)
def _video_graph(on_gpu: bool, image_size: int):
    has_pixels = _source("has_pixels", DALIDataType.BOOL, 0)
    encoded = _source("encoded", DALIDataType.UINT8, 1)
    pixels = _source("pixels", DALIDataType.UINT8, 4, "FHWC")
    if has_pixels:
        image = pixels.gpu() if on_gpu else pixels
    else:
        # Out of range must raise: the default is a black frame.
        device = "mixed" if on_gpu else "cpu"
        image = fn.decoders.video(encoded, device=device, frames=[0], pad_mode="none")
    return _waveform(), _to_input(image, image_size, "FCHW")


@pipeline_def(enable_conditionals=True)
def _image_graph(on_gpu: bool, image_size: int, config: DataConfig):
    encoded = _source("encoded", DALIDataType.UINT8, 1)
    image = fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=DALIImageType.RGB,
        jpeg_fancy_upsampling=True,
        adjust_orientation=False,
        hw_decoder_load=config.jpeg_hardware_load,
        preallocate_width_hint=config.jpeg_width_hint,
        preallocate_height_hint=config.jpeg_height_hint,
    )
    return _waveform(), _to_input(image, image_size, "CHW")
