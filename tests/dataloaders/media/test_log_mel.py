"""The log-mel is Kaldi's: held to the published code's numbers and to an independent program."""

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import kaldi_native_fbank
import numpy as np
import pytest
import torch

from cavmae.dataloaders.loading.augment import mixed_waveform
from cavmae.dataloaders.media.log_mel import log_mel

CPU = torch.device("cpu")
MOST, MEAN = 2e-3, 2e-5


def kaldi(waveform: np.ndarray, mel_bins: int) -> np.ndarray:
    """kaldi-native-fbank on a waveform in -1 to 1, `(frames, mel_bins)`."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = mel_bins
    options.use_energy = False
    fbank = kaldi_native_fbank.OnlineFbank(options)
    fbank.accept_waveform(16000, (waveform - waveform.mean()).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(frame) for frame in range(fbank.num_frames_ready)])


def generated(samples: int, seed: int = 0) -> np.ndarray:
    """A sweep with noise and an offset, float32 in -1 to 1."""
    seconds = np.arange(samples) / 16000
    noise = np.random.default_rng(seed).standard_normal(samples)
    sweep = np.sin(2 * np.pi * (200 + 400 * seconds) * seconds)
    return (0.3 * sweep + 0.05 * noise + 0.02).astype(np.float32)


def assert_close(ours: np.ndarray, reference: np.ndarray) -> None:
    difference = np.abs(ours - reference)
    assert difference.max() < MOST
    assert difference.mean() < MEAN


@pytest.mark.parametrize("mel_bins", [64, 128])
@pytest.mark.parametrize("samples", [400, 559, 560, 12345, 32000])
def test_equals_kaldi_on_generated_sound(samples: int, mel_bins: int) -> None:
    waveform = generated(samples)
    reference = kaldi(waveform, mel_bins)
    ours = log_mel([torch.from_numpy(waveform)], mel_bins, len(reference), CPU)[0].numpy()
    assert_close(ours, reference)


def test_short_clips_are_padded_with_zeros_and_long_ones_are_cut() -> None:
    waveform = generated(32000)
    reference = kaldi(waveform, 64)
    padded = log_mel([torch.from_numpy(waveform)], 64, 250, CPU)[0].numpy()
    cut = log_mel([torch.from_numpy(waveform)], 64, 100, CPU)[0].numpy()
    assert len(reference) == 198
    assert_close(padded[:198], reference)
    assert (padded[198:] == 0).all()
    assert_close(cut, reference[:100])


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_clips_of_a_batch_do_not_depend_on_each_other(torch_threads: None) -> None:
    waveforms = [torch.from_numpy(generated(samples, samples)) for samples in (900, 32000, 16000)]
    together = log_mel(waveforms, 64, 150, CPU)
    alone = torch.cat([log_mel([waveform], 64, 150, CPU) for waveform in waveforms])
    assert torch.equal(together, alone)


def test_int16_counts_as_a_share_of_full_scale() -> None:
    whole_numbers = (generated(16000) * 32767).round().astype(np.int16)
    as_float = torch.from_numpy(whole_numbers.astype(np.float32) / 32768)
    whole = log_mel([torch.from_numpy(whole_numbers)], 128, 98, CPU)
    assert torch.equal(whole, log_mel([as_float], 128, 98, CPU))


def test_silence_is_the_logarithm_of_the_float_epsilon() -> None:
    silence = log_mel([torch.full((8000,), 0.25)], 64, 48, CPU)
    assert torch.allclose(silence, torch.tensor(-15.942385))


def read_flac(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate(
            [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        )


@pytest.mark.golden
@pytest.mark.parametrize("clip", ["KlsG1EnBEjc_000361", "00W1lcxW-WU_40.000"])
def test_equals_the_published_input_of_sample_videos(golden_folder: Path, clip: str) -> None:
    folder = golden_folder / "preprocess"
    if not (folder / f"{clip}.flac").exists():
        pytest.skip(f"{folder} has no {clip}.flac")
    reference = np.load(folder / f"{clip}_fbank.npz")["fbank_raw"]
    waveform = torch.from_numpy(read_flac(folder / f"{clip}.flac"))
    assert_close(log_mel([waveform], 128, len(reference), CPU)[0].numpy(), reference)


SYNTHETIC = [
    "T1024_short",
    "T1024_exact",
    "T1024_long",
    "T1024_odd",
    "T1024_mix_short_long_0.3",
    "T1024_mix_long_short_0.6",
]


def synthetic(name: str, length: int, seed: int) -> np.ndarray:
    """The golden folder's recipe for a waveform."""
    seconds = np.arange(length) / 16000
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"wave.{name}".encode()) + seed))
    noise = generator.standard_normal((length,))
    wave = 0.3 * np.sin(2 * np.pi * (200 + 300 * seconds) * seconds) + 0.05 * noise + 0.02
    return (np.clip(np.round(wave * 32767), -32768, 32767) / 32768).astype(np.float32)


@pytest.mark.golden
@pytest.mark.parametrize("case", SYNTHETIC)
def test_equals_the_published_input_of_synthetic_sound(golden_folder: Path, case: str) -> None:
    folder = golden_folder / "preprocess"
    if not (folder / "synthetic.json").exists():
        pytest.skip(f"{folder} has no synthetic.json")
    recipe = json.loads((folder / "synthetic.json").read_text())
    lengths, seed = recipe["lengths"], recipe["seed"]
    parts = case.split("_")[1:]
    if parts[0] == "mix":
        first, second = (synthetic(name, lengths[name], seed) for name in parts[1:3])
        waveform = mixed_waveform(first, second, float(parts[3]))
    else:
        waveform = synthetic(parts[0], lengths[parts[0]], seed)
    reference = np.load(folder / "synthetic_fbank_s4.npz")[case]
    ours = log_mel([torch.from_numpy(waveform)], 128, 1024, CPU)[0].numpy()
    assert_close(ours[::4, ::4], reference)
