"""The published way to load clips, and two usual ways from raw video, as PyTorch datasets.

The published loader (cav-mae, src/dataloader.py) reads a WAV file and one of ten JPEGs of 224 x 224
pixels a clip, and computes Kaldi's filter banks and the picture's transforms item by item in
DataLoader workers. torchaudio can't be installed beside a CPU build of torch; `fbank` has the
operations of its `compliance.kaldi.fbank`, mel filters made anew in every call included, and a test
compares its numbers with the loader's own. The other two read the same from raw videos, with PyAV
and with decord.
"""

import math
import wave
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from cavmae.dataloaders.constants import AUDIO_HZ, IMAGE_MEAN, IMAGE_STD
from cavmae.dataloaders.loading.augment import resize_and_crop
from cavmae.dataloaders.media.log_mel import FFT_SAMPLES, HOP_SAMPLES, PREEMPHASIS, WINDOW_SAMPLES

MEAN, STD = -5.081, 4.4849
FRAMES, BINS, SIZE = 1024, 128, 224


class PublishedDataset(Dataset):
    """Items of `folder/KEY.wav` and `folder/frame_{0-9}/KEY.jpg`.

    Args:
        folder: of all clips.
        length: items; clips come again and again.
    """

    def __init__(self, folder: Path, length: int):
        self.folder, self.length = folder, length
        self.keys = sorted(path.stem for path in folder.glob("*.wav"))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = self.keys[index % len(self.keys)]
        with wave.open(str(self.folder / f"{key}.wav")) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
        frame = self.folder / f"frame_{np.random.randint(10)}" / f"{key}.jpg"
        return _sound(samples), _picture(Image.open(frame).convert("RGB"))


class RawVideoDataset(Dataset):
    """One frame at a random time, and the sound, of each video.

    Args:
        videos: files with H.264 and AAC.
        length: items; videos come again and again.
        decoder: `pyav` or `decord` for the frame; PyAV decodes the sound for both.
    """

    def __init__(self, videos: list[Path], length: int, decoder: str):
        self.videos, self.length, self.decoder = videos, length, decoder

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self.videos[index % len(self.videos)]
        read = _frame_by_pyav if self.decoder == "pyav" else _frame_by_decord
        return _sound(_sound_of(path)), _picture(Image.fromarray(read(path)))


def batches(dataset: Dataset, batch: int, workers: int) -> DataLoader:
    """The DataLoader that the published code builds."""
    return DataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True)


def write_published(folder: Path, key: str, wav: bytes, frames: Sequence[Image.Image]) -> None:
    """Files of one clip as the published preparation leaves them.

    Args:
        wav: file with the sound, int16 at 16 kHz.
        frames: ten; short side to 224 and the middle 224 x 224 pixels are kept.
    """
    (folder / f"{key}.wav").write_bytes(wav)
    for number, frame in enumerate(frames):
        place = folder / f"frame_{number}" / f"{key}.jpg"
        place.parent.mkdir(exist_ok=True)
        _resized(frame).save(place, quality=95)


def _sound(samples: np.ndarray) -> torch.Tensor:
    """`(1024, 128)` normalised log-mel."""
    waveform = torch.from_numpy(samples.astype(np.float32)) / 32768
    spectrogram = fbank(waveform - waveform.mean())
    missing = FRAMES - len(spectrogram)
    spectrogram = torch.nn.functional.pad(spectrogram, (0, 0, 0, missing))
    return (spectrogram - MEAN) / STD


def fbank(waveform: torch.Tensor) -> torch.Tensor:
    """`(frames, 128)` of `(samples,)` at 16 kHz: torchaudio's operations with the published
    options (htk_compat, hanning, no dither, no energy)."""
    epsilon = torch.tensor(torch.finfo(torch.float32).eps)
    count = 1 + (len(waveform) - WINDOW_SAMPLES) // HOP_SAMPLES
    windows = waveform.as_strided((count, WINDOW_SAMPLES), (HOP_SAMPLES, 1))
    windows = windows - windows.mean(1).unsqueeze(1)
    torch.max(windows.pow(2).sum(1), epsilon).log()  # The energy, which is computed in any case.
    before = torch.nn.functional.pad(windows.unsqueeze(0), (1, 0), mode="replicate").squeeze(0)
    windows = windows - PREEMPHASIS * before[:, :-1]
    windows = windows * torch.hann_window(WINDOW_SAMPLES, periodic=False).unsqueeze(0)
    padded = torch.nn.functional.pad(windows.unsqueeze(0), (0, FFT_SAMPLES - WINDOW_SAMPLES))
    spectrum = torch.fft.rfft(padded.squeeze(0)).abs().pow(2.0)
    filters = torch.nn.functional.pad(_mel_filters(), (0, 1))
    return torch.max(torch.mm(spectrum, filters.T), epsilon).log()


def _mel_filters() -> torch.Tensor:
    """`(128, 256)`, made as torchaudio's `get_mel_banks` does."""
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (20.0, AUDIO_HZ / 2))
    step = (high - low) / (BINS + 1)
    bins = torch.arange(BINS).unsqueeze(1)
    left, center, right = low + bins * step, low + (bins + 1.0) * step, low + (bins + 2.0) * step
    mel = 1127.0 * (1.0 + AUDIO_HZ / FFT_SAMPLES * torch.arange(FFT_SAMPLES // 2) / 700.0).log()
    up, down = (mel.unsqueeze(0) - left) / (center - left), (right - mel) / (right - center)
    return torch.max(torch.zeros(1), torch.min(up, down))


def _picture(frame: Image.Image) -> torch.Tensor:
    """`(3, 224, 224)` float32."""
    pixels = torch.from_numpy(np.array(_resized(frame))).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _resized(frame: Image.Image) -> Image.Image:
    """Short side to 224, then the middle; as published, a frame of that size is left alone."""
    (height, width), (top, left) = resize_and_crop(frame.height, frame.width, SIZE)
    if (frame.width, frame.height) != (width, height):
        frame = frame.resize((width, height), Image.Resampling.BICUBIC)
    x, y = round(left * (width - SIZE)), round(top * (height - SIZE))
    return frame.crop((x, y, x + SIZE, y + SIZE))


def _frame_by_pyav(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        assert stream.duration is not None
        wanted = np.random.randint(stream.duration)
        container.seek(int(wanted), stream=stream)
        shown = None
        for frame in container.decode(stream):
            if shown is not None and frame.pts is not None and frame.pts > wanted:
                break
            shown = frame
        assert shown is not None
        return shown.to_ndarray(format="rgb24")


def _frame_by_decord(path: Path) -> np.ndarray:
    import decord  # pyright: ignore[reportMissingImports]

    reader = decord.VideoReader(str(path), num_threads=1)
    return reader[np.random.randint(len(reader))].asnumpy()


def _sound_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_HZ)
        parts = [
            part.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for part in resampler.resample(frame)
        ]
    return np.concatenate(parts)
