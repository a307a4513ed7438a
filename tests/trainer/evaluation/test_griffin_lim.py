"""A log-mel is made audible again: what comes out has the log-mel, the pitch and the level."""

import pytest
import torch

from cavmae.dataloaders.media.log_mel import hann_window, log_mel, mel_filters
from cavmae.trainer.evaluation.griffin_lim import power_from_mel, waveform_from_log_mel

CPU = torch.device("cpu")
SECONDS = torch.arange(16000) / 16000
SINES = {440.0: 0.2, 1500.0: 0.1, 4000.0: 0.05}
SOUNDS = {
    "sines": sum(
        (level * torch.sin(2 * torch.pi * hertz * SECONDS) for hertz, level in SINES.items()),
        torch.zeros(16000),
    ),
    "sweep": 0.3 * torch.sin(2 * torch.pi * (300 + 1400 * SECONDS) * SECONDS),
}


def log_mel_of(waveform: torch.Tensor, frames: int = 98) -> torch.Tensor:
    return log_mel([waveform], 128, frames, CPU)[0]


@pytest.mark.parametrize("name", SOUNDS)
def test_the_log_mel_of_the_sound_is_close_to_the_one_it_was_made_from(name: str) -> None:
    wanted = log_mel_of(SOUNDS[name])
    found = log_mel_of(waveform_from_log_mel(wanted, iterations=100, seed=0))
    assert torch.corrcoef(torch.stack([wanted.flatten(), found.flatten()]))[0, 1] > 0.98
    # Random phases alone are at 0.24 and more; a pre-emphasis that stays moves it by 0.5 and more.
    assert (found - wanted).abs().median() < 0.15


def test_sines_keep_their_frequencies_and_levels() -> None:
    waveform = waveform_from_log_mel(log_mel_of(SOUNDS["sines"]), iterations=100, seed=0)
    middle = waveform[4000:12000]  # 2 Hz a bin
    spectrum = torch.fft.rfft(middle * torch.hann_window(8000)).abs()
    for hertz, level in SINES.items():
        bin = round(hertz / 2)
        near = spectrum[bin - 30 : bin + 31]
        assert abs(int(near.argmax()) - 30) <= 8  # within 16 Hz, half a bin of the log-mel's FFT
        energy = near.square().sum().sqrt() / torch.hann_window(8000).square().sum().sqrt()
        assert energy / 8000**0.5 * 2 == pytest.approx(level, rel=0.25)


def test_more_iterations_come_closer() -> None:
    wanted = log_mel_of(SOUNDS["sweep"])
    distances = [
        (log_mel_of(waveform_from_log_mel(wanted, iterations=count, seed=0)) - wanted).abs().mean()
        for count in (1, 10, 100)
    ]
    assert distances == sorted(distances, reverse=True)


def test_the_seed_decides_the_sound_and_the_frames_its_length() -> None:
    wanted = log_mel_of(SOUNDS["sweep"])[:40]
    first, again, other = (waveform_from_log_mel(wanted, iterations=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (39 * 160 + 400,)


def test_powers_are_never_below_zero_and_explain_the_mel_powers() -> None:
    frames = SOUNDS["sweep"].unfold(0, 400, 160) * hann_window(CPU)
    filters = mel_filters(128, CPU, torch.float32)
    mel = torch.fft.rfft(frames, n=512).abs().square() @ filters
    found = power_from_mel(mel)
    assert found.shape == (98, 257) and (found >= 0).all()
    loud = mel > mel.amax(1, keepdim=True) * 1e-6
    difference = ((found @ filters).clamp(min=1e-20).log() - mel.clamp(min=1e-20).log()).abs()
    assert difference[loud].mean() < 0.1
