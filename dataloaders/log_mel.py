"""Log-mel spectrograms as Kaldi computes them, batched in torch on the device that trains.

Neither torchaudio (its wheels want CUDA torch) nor DALI's operators (their mel filters and missing
DC removal are off by 4 to 8) give the published input; this file follows Kaldi's
`compute-fbank-feats --htk-compat --window-type=hanning --dither=0 --num-mel-bins=128`, which
the published code calls through torchaudio: 25 ms windows every 10 ms, whole windows only.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

AUDIO_HZ = 16000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
CHUNK_CLIPS = 64
"""Clips transformed together on an accelerator: 10 s clips take 0.5 GB of working memory."""


def log_mel(
    waveforms: Sequence[torch.Tensor], mel_bins: int, frames: int, device: torch.device
) -> torch.Tensor:
    """Log-mel of each waveform, zero-padded or cut to the same number of frames.

    The waveform's mean is subtracted first. Padding is zero, as in the published code, although
    silence is `log(epsilon)` = -15.9; nothing is normalised here.

    Args:
        waveforms: mono at 16 kHz, `(samples,)` each, int16 or float32 in -1 to 1, any lengths.
        mel_bins: number of mel filters from 20 Hz to 8 kHz.
        frames: frames of the result, one each 10 ms.
        device: where to compute, and where the result is.

    Returns:
        `(batch, frames, mel_bins)` float32.
    """
    result = torch.zeros(len(waveforms), frames, mel_bins, device=device)
    # Cache misses cost more than batching gains on a CPU: one clip at a time is the fastest there.
    chunk_clips = 1 if device.type == "cpu" else CHUNK_CLIPS
    for start in range(0, len(waveforms), chunk_clips):
        chunk = waveforms[start : start + chunk_clips]
        lengths = torch.tensor([len(waveform) for waveform in chunk])
        padded = torch.nn.utils.rnn.pad_sequence(list(chunk), batch_first=True)
        result[start : start + len(chunk)] = _chunk(
            padded.to(device), lengths.to(device), mel_bins, frames
        )
    return result


def _chunk(
    waveforms: torch.Tensor, lengths: torch.Tensor, mel_bins: int, frames: int
) -> torch.Tensor:
    """`(clips, samples)` padded waveforms and `(clips,)` lengths to `(clips, frames, mel_bins)`."""
    device = waveforms.device
    if waveforms.dtype == torch.int16:
        waveforms = waveforms.float() / 32768
    inside = torch.arange(waveforms.shape[1], device=device) < lengths[:, None]
    mean = waveforms.sum(1, dtype=torch.float64) / lengths.clamp(min=1)
    waveforms = torch.where(inside, waveforms - mean.float()[:, None], 0.0)

    needed = (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES
    waveforms = torch.nn.functional.pad(waveforms, (0, needed - waveforms.shape[1]))
    windows = waveforms.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)  # (clips, frames, 400)
    windows = windows - windows.mean(2, keepdim=True)
    earlier = torch.cat([windows[..., :1], windows[..., :-1]], 2)
    windows = (windows - PREEMPHASIS * earlier) * _hann(device)
    spectrum = torch.fft.rfft(windows, FFT_SAMPLES)  # (clips, frames, 257)
    power = spectrum.real.square() + spectrum.imag.square()
    # TF32's ten bits would move the logarithm by 1e-3. Its switch belongs to the whole process,
    # and this runs beside the training thread: float64 keeps it out without touching the switch.
    exact = torch.float32 if device.type == "cpu" else torch.float64
    mel = (power.to(exact) @ _mel_filters(mel_bins, device, exact)).float()  # (clips, frames, mel)
    logarithm = mel.clamp(min=torch.finfo(torch.float32).eps).log()

    whole_windows = (lengths - WINDOW_SAMPLES).div(HOP_SAMPLES, rounding_mode="floor") + 1
    present = torch.arange(frames, device=device) < whole_windows[:, None]
    return torch.where(present[..., None], logarithm, 0.0)


@lru_cache(maxsize=4)
def _hann(device: torch.device) -> torch.Tensor:
    """`(400,)` symmetric Hann window."""
    return torch.hann_window(WINDOW_SAMPLES, periodic=False, device=device)


@lru_cache(maxsize=4)
def _mel_filters(mel_bins: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`(257, mel_bins)` triangles, equally spaced on the HTK mel scale from 20 Hz to 8 kHz."""
    lowest = _mel(torch.tensor(LOWEST_HZ, dtype=torch.float64))
    highest = _mel(torch.tensor(AUDIO_HZ / 2, dtype=torch.float64))
    corners = torch.linspace(0, 1, mel_bins + 2, dtype=torch.float64) * (highest - lowest) + lowest
    bins = _mel(torch.arange(FFT_SAMPLES // 2, dtype=torch.float64) * (AUDIO_HZ / FFT_SAMPLES))
    rising = (bins[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins[:, None]) / (corners[2:] - corners[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    # Kaldi leaves the Nyquist bin out of every filter.
    return torch.nn.functional.pad(triangles, (0, 0, 0, 1)).to(device, dtype)


def _mel(hertz: torch.Tensor) -> torch.Tensor:
    return 1127.0 * torch.log(1.0 + hertz / 700.0)
