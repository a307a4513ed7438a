"""Sound from a log-mel, so that a reconstruction can be heard: the inverse of
`dataloaders.log_mel`, as far as there is one.

Three things are lost in a log-mel. The filters' 257 powers are found again as those above zero
that explain the mel powers best, the phase by Griffin and Lim's iterations with the momentum of
Perraudin et al. ("A fast Griffin-Lim algorithm", WASPAA 2013); the pre-emphasis is undone
exactly. The mean that Kaldi takes from each window stays lost, and is hardly heard.
"""

import torch
import torch.nn.functional as F

from cavmae.dataloaders.media.log_mel import (
    FFT_SAMPLES,
    HOP_SAMPLES,
    PREEMPHASIS,
    WINDOW_SAMPLES,
    hann_window,
    mel_filters,
)

MOMENTUM = 0.99
"""Of Perraudin et al.; 0 is the algorithm of Griffin and Lim."""
FILTER_ITERATIONS = 100
SMALLEST_OVERLAP = 0.05
"""Windows add up to 0.7 and more except at both ends, where a division by almost nothing would be
a click: the ends fade instead."""


def waveform_from_log_mel(log_mel: torch.Tensor, *, iterations: int, seed: int) -> torch.Tensor:
    """Compute a waveform whose log-mel is close to the one given; its level is kept.

    Args:
        log_mel: (frames, mel_bins) float32, natural log, not normalised and without padding; one
            frame or more.
        iterations: of Griffin-Lim, 1 or more.
        seed: of the phases that it begins with, which are the same on every device.

    Returns:
        ((frames - 1) * 160 + 400,) float32 mono at 16 kHz, mostly in -1 to 1.
    """
    magnitude = power_from_mel(log_mel.exp()).sqrt()  # (frames, 257)
    phases = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed))
    direction = torch.polar(torch.ones_like(phases), 2 * torch.pi * phases).to(log_mel.device)
    before = torch.zeros_like(direction)
    for _ in range(iterations):
        consistent = _spectrum(_overlap_add(magnitude * direction))
        ahead = consistent + MOMENTUM * (consistent - before)
        direction = ahead / ahead.abs().clamp(min=1e-12)
        before = consistent
    return _without_preemphasis(_overlap_add(magnitude * direction))


def power_from_mel(mel: torch.Tensor) -> torch.Tensor:
    """Compute powers, 0 or more, of the FFT's bins that explain mel powers best.

    Multiplicative updates for the Kullback-Leibler divergence (Lee and Seung, NIPS 2000): powers
    differ by ten orders of magnitude, and least squares would see only the loudest.

    Args:
        mel: (frames, mel_bins) powers, above 0.

    Returns:
        (frames, 257).
    """
    filters = mel_filters(mel.shape[1], mel.device, mel.dtype)  # (257, mel_bins)
    heard = filters.sum(1).clamp(min=1e-6)  # bins that no filter hears have a numerator of 0
    power = mel @ filters.T / heard  # (frames, 257)
    for _ in range(FILTER_ITERATIONS):
        ratio = mel / (power @ filters).clamp(min=1e-12)  # (frames, mel_bins)
        power = power * (ratio @ filters.T) / heard
    return power


def _spectrum(waveform: torch.Tensor) -> torch.Tensor:
    """(samples,) to (frames, 257), framed as `dataloaders.log_mel` does."""
    frames = waveform.unfold(0, WINDOW_SAMPLES, HOP_SAMPLES)  # (frames, 400)
    return torch.fft.rfft(frames * hann_window(waveform.device), n=FFT_SAMPLES)


def _overlap_add(spectrum: torch.Tensor) -> torch.Tensor:
    """(frames, 257) to (samples,): the waveform whose spectrum is nearest in squares."""
    window = hann_window(spectrum.device)
    frames = torch.fft.irfft(spectrum, n=FFT_SAMPLES)[:, :WINDOW_SAMPLES] * window
    both = torch.stack([frames, window.square().expand_as(frames)])  # (2, frames, 400)
    samples = (len(frames) - 1) * HOP_SAMPLES + WINDOW_SAMPLES
    summed, overlap = F.fold(
        both.transpose(1, 2), (1, samples), kernel_size=(1, WINDOW_SAMPLES), stride=(1, HOP_SAMPLES)
    ).flatten(1)  # (2, samples)
    return summed / overlap.clamp(min=SMALLEST_OVERLAP)


def _without_preemphasis(emphasised: torch.Tensor) -> torch.Tensor:
    """(samples,): solves `emphasised[t] = x[t] - 0.97 x[t - 1]` for `x`, with `x[-1] = 0`."""
    samples = len(emphasised)
    response = PREEMPHASIS ** torch.arange(samples, device=emphasised.device)
    length = 2 * samples  # so that the convolution does not come around
    product = torch.fft.rfft(emphasised, n=length) * torch.fft.rfft(response, n=length)
    return torch.fft.irfft(product, n=length)[:samples]
