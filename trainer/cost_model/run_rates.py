"""How fast a run is, beside its machine, and where its time goes: the metrics of every logged step.

Everything is counted, or read on the host where a step is logged anyway; no rank waits for it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from cavmae.trainer.config.configs import FinetuneConfig, PretrainConfig, RunConfig
from cavmae.trainer.cost_model.flops import classification_flops, training_flops
from cavmae.trainer.cost_model.gpus import find_gpu

Span = Callable[[str], AbstractContextManager[object]]

_APART: tuple[str, ...] = ("validation", "checkpoint")
"""Parts that are no training."""


class RunRates:
    """Measures one attempt of a run on this rank.

    Model FLOP/s and MFU are of the time without validation and checkpoints; what is computed twice
    to save memory counts once.

    Args:
        config: resolved run.
        world_size: ranks.
        device: this rank's device.
        label: context of a named part of a step.
    """

    def __init__(
        self, config: RunConfig, world_size: int, device: torch.device, label: Span
    ) -> None:
        self._config, self._device, self._label = config, device, label
        self._rank_flops = sample_flops(config) / world_size
        tokens = {"audio": config.model.audio_tokens, "video": config.model.video_tokens}
        self._tokens = sum(tokens[modality] for modality in config.data.modalities)
        self._peak = peak_flops_per_second(config, device)
        self._apart = dict.fromkeys(_APART, 0.0)
        self.begin(0, 0.0)

    def begin(self, step: int, waited: float) -> None:
        """Note that the training loop begins.

        Args:
            step: optimizer steps done.
            waited: seconds that the loader has been waited for, in all.
        """
        self._start, self._waited_before = time.monotonic(), waited
        self._last = (step, self.seconds(waited))

    def span(self, name: str) -> AbstractContextManager[object]:
        """Label a part of a step, and time it if it is no training."""
        return self._timed(name) if name in self._apart else self._label(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with self._label(name):
            yield
        self._apart[name] += time.monotonic() - began

    def seconds(self, waited: float) -> dict[str, float]:
        """Return the seconds of this attempt so far, and of its parts."""
        return {
            "attempt_seconds": time.monotonic() - self._start,
            "data_wait_seconds": waited - self._waited_before,
            **{f"{name}_seconds": seconds for name, seconds in self._apart.items()},
        }

    def metrics(self, step: int, waited: float) -> dict[str, float]:
        """Return the rates of the steps since the last call, or `begin`, and the seconds of this
        attempt so far.

        Args:
            step: optimizer steps done.
            waited: seconds that the loader has been waited for, in all.
        """
        now = self.seconds(waited)
        step_before, before = self._last
        self._last = (step, now)
        samples = (step - step_before) * self._config.global_batch
        spent = {name: seconds - before[name] for name, seconds in now.items()}
        seconds = max(spent["attempt_seconds"], 1e-9)
        training = max(seconds - sum(spent[f"{name}_seconds"] for name in _APART), 1e-9)
        flops_per_second = samples * self._rank_flops / training
        rates = {
            "samples_per_second": samples / seconds,
            "data_wait_share": spent["data_wait_seconds"] / seconds,
            "tokens_per_second": samples * self._tokens / training,
            "tflops_per_rank": flops_per_second / 1e12,
            "peak_memory_bytes": float(peak_bytes(self._device)),
        }
        mfu = {"mfu": flops_per_second / self._peak} if self._peak else {}
        return now | rates | mfu


def sample_flops(config: RunConfig) -> int:
    """Count the operations that the training of one sample needs; see `flops.py`."""
    if isinstance(config, FinetuneConfig):
        settings = config.classifier
        return classification_flops(config.model, settings.mode, encoders=settings.train_encoders)
    assert isinstance(config, PretrainConfig)
    ratios = (config.mask.audio_ratio, config.mask.video_ratio)
    return training_flops(
        config.model,
        *ratios,
        reconstruct=config.loss.reconstruction_weight > 0,
        modalities=config.data.modalities,
    )


def peak_flops_per_second(config: RunConfig, device: torch.device) -> float:
    """Return the matrix rate that MFU is relative to: `tracking.peak_tflops`, or that of the GPU's
    data sheet in the run's dtype; 0 where neither is known."""
    if config.tracking.peak_tflops:
        return config.tracking.peak_tflops * 1e12
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        return 0.0
    return gpu.bf16 if config.engine.dtype == "bf16" else gpu.fp32


def peak_bytes(device: torch.device) -> int:
    """Return the peak: of tensors on a GPU; on a CPU of the process, program and libraries
    included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return status_bytes("VmHWM")


def status_bytes(name: str) -> int:
    """Return a line of this process's `/proc/self/status`, such as `VmRSS`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(one for one in lines if one.startswith(f"{name}:")).split()[1])
