"""Kaldi's log-mel spectrograms, batched in torch on the training device.

Neither torchaudio (its wheels want CUDA torch) nor DALI's operators (their mel filters and missing
DC removal are off by 4 to 8) give the published input; this file follows Kaldi's
`compute-fbank-feats --htk-compat --window-type=hanning --dither=0 --num-mel-bins=128`, which
the published code calls through torchaudio: 25 ms windows every 10 ms, whole windows only.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

from cavmae.dataloaders.constants import AUDIO_HZ, HOP_SAMPLES, WINDOW_SAMPLES

FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
CHUNK_CLIPS = 64
"""Clips per chunk on an accelerator: 10 s clips take 0.5 GB of working memory."""


def log_mel(
    waveforms: Sequence[torch.Tensor], mel_bins: int, frames: int, device: torch.device
) -> torch.Tensor:
    """Compute the log-mel of each waveform, zero-padded or cut to the same number of frames.

    The waveform's mean is subtracted first. Padding is zero, as in the published code, although
    silence is `log(epsilon)` = -15.9; nothing is normalised here.

    Args:
        waveforms: mono at 16 kHz, `(samples,)` each, any lengths; all of them int16, or all
            float32 in -1 to 1.
        mel_bins: number of mel filters from 20 Hz to 8 kHz.
        frames: frames of the result, one every 10 ms.
        device: of the computation and the result.

    Returns:
        `(batch, frames, mel_bins)` float32.
    """
    result = torch.zeros(len(waveforms), frames, mel_bins, device=device)

    def compute(chunk: slice) -> None:
        some = list(waveforms[chunk])
        lengths = torch.tensor([len(waveform) for waveform in some])
        padded = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        result[chunk] = _chunk(padded.to(device), lengths, mel_bins, frames)

    if device.type != "cpu":
        for start in range(0, len(waveforms), CHUNK_CLIPS):
            compute(slice(start, start + CHUNK_CLIPS))
        return result
    # Cache misses cost more than batching gains on a CPU: a clip at a time is the fastest there.
    clips = [slice(number, number + 1) for number in range(len(waveforms))]
    threads = torch.get_num_threads()
    if threads == 1:
        for clip in clips:
            compute(clip)
    else:
        list(_clip_threads(threads, os.getpid()).map(compute, clips))
    return result


@lru_cache(maxsize=1)
def _clip_threads(count: int, process: int) -> ThreadPoolExecutor:
    """Make a pool of threads in which torch uses one thread each.

    Operations this small gain nothing from torch's own threads, which spin while they wait for each
    other. torch stores the number per thread, and a default for new threads, which is restored.
    """
    pool = ThreadPoolExecutor(count, "log-mel", initializer=torch.set_num_threads, initargs=(1,))
    started = threading.Barrier(count + 1)
    for _ in range(count):
        pool.submit(started.wait)
    started.wait()
    restore = threading.Thread(target=torch.set_num_threads, args=(count,))
    restore.start()
    restore.join()
    return pool


def _chunk(
    waveforms: torch.Tensor, lengths: torch.Tensor, mel_bins: int, frames: int
) -> torch.Tensor:
    """`(clips, samples)` padded waveforms and `(clips,)` lengths to `(clips, frames, mel_bins)`.

    Kaldi removes each window's mean, then applies the pre-emphasis and the Hann window `h`. All are
    linear: `h * (x[t] - c x[t-1]) - (1 - c) * mean * h`, so the pre-emphasis is applied once to the
    waveform. (A window's first sample, which Kaldi takes as its own predecessor, has `h = 0`.)
    """
    device = waveforms.device
    if waveforms.dtype == torch.int16:
        waveforms = waveforms.float() / 32768
    whole = ((lengths - WINDOW_SAMPLES).div(HOP_SAMPLES, rounding_mode="floor") + 1).clamp(min=0)
    mean = waveforms.sum(1, dtype=torch.float64) / lengths.clamp(min=1).to(device)
    waveforms = waveforms - mean.float()[:, None]
    if int(lengths.min()) < waveforms.shape[1]:
        outside = torch.arange(waveforms.shape[1], device=device) >= lengths.to(device)[:, None]
        waveforms.masked_fill_(outside, 0.0)

    result = torch.zeros(len(waveforms), frames, mel_bins, device=device)
    computed = min(frames, int(whole.max()))
    if computed == 0:
        return result
    waveforms = waveforms[:, : (computed - 1) * HOP_SAMPLES + WINDOW_SAMPLES]
    emphasised = waveforms.clone()
    emphasised[:, 1:].sub_(waveforms[:, :-1], alpha=PREEMPHASIS)
    # A window is five blocks of 80 samples, the next one begins two blocks later.
    blocks = waveforms.unflatten(1, (-1, HOP_SAMPLES // 2)).sum(2)
    means = blocks.unfold(1, WINDOW_SAMPLES * 2 // HOP_SAMPLES, 2).sum(2) / WINDOW_SAMPLES
    hann = hann_window(device)
    windows = torch.empty(len(waveforms), computed, FFT_SAMPLES, device=device)
    inner = windows[..., :WINDOW_SAMPLES]
    windows[..., WINDOW_SAMPLES:] = 0
    torch.mul(emphasised.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES), hann, out=inner)
    inner.addcmul_(means[..., None], hann, value=PREEMPHASIS - 1)
    spectrum = torch.fft.rfft(windows)  # (clips, computed, 257)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    # TF32's ten bits would move the logarithm by 1e-3. Its switch belongs to the whole process,
    # and this runs beside the training thread: float64 keeps it out without touching the switch.
    exact = torch.float32 if device.type == "cpu" else torch.float64
    power = power.to(exact)
    mel = [power[..., low:high] @ part for low, high, part in _mel_groups(mel_bins, device, exact)]
    present = result[:, :computed]
    present.copy_(torch.cat(mel, 2))
    present.clamp_(min=torch.finfo(torch.float32).eps).log_()
    if int(whole.min()) < computed:
        absent = torch.arange(frames, device=device) >= whole.to(device)[:, None]
        result.masked_fill_(absent[..., None], 0.0)
    return result


@lru_cache(maxsize=4)
def hann_window(device: torch.device) -> torch.Tensor:
    """`(400,)` symmetric Hann window."""
    return torch.hann_window(WINDOW_SAMPLES, periodic=False, device=device)


@lru_cache(maxsize=4)
def _mel_groups(
    mel_bins: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[int, int, torch.Tensor]]:
    """Split the filters into four groups without their all-zero rows: first row, end, and
    `(end - first, filters)`. This leaves a quarter of the products."""
    groups = []
    for part in mel_filters(mel_bins, device, dtype).chunk(4, 1):
        rows = part.any(1).nonzero().flatten().tolist() or [0]
        groups.append((rows[0], rows[-1] + 1, part[rows[0] : rows[-1] + 1].contiguous()))
    return groups


@lru_cache(maxsize=4)
def mel_filters(mel_bins: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
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
