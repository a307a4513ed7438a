"""One training step (forward, backward, update) of our model or of the baseline, without engine.

Inputs are random and fixed; new masks are drawn in every step, as in training.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from cavmae.benchmarks.baselines.published import PublishedCAVMAE
from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.kernels import AttentionBackend, contrastive_loss
from cavmae.trainer.config.recipes import audioset_huge, audioset_large
from cavmae.trainer.model.blocks import Recompute
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import MaskConfig, ModelConfig
from cavmae.trainer.model.masking import random_masks

Precision = Literal["fp32", "bf16"]
ModelName = Literal["cavmae", "published"]
Size = Literal["base", "large", "huge", "tiny"]

SIZES: dict[Size, ModelConfig] = {
    "base": ModelConfig(),
    "large": audioset_large().model,
    "huge": audioset_huge().model,
    "tiny": ModelConfig(
        audio_frames=128,
        image_size=64,
        width=48,
        modality_depth=2,
        heads=4,
        decoder_width=32,
        decoder_depth=2,
        decoder_heads=4,
    ),
}

LEARNING_RATE = 1e-4
CONTRASTIVE_WEIGHT = 0.01
TEMPERATURE = 0.05
PARTS = ("forward", "backward", "update")
"""Of a step, in their order."""
SLICE_ELEMENTS = 16_000_000
"""Parameters whose float32 gradients exist at the same time."""


@dataclass(frozen=True)
class Choices:
    """Implementation choices of our step; the defaults are those of a run.

    Attributes:
        attention: see `cavmae.kernels.attention`.
        fused_update: Adam in one pass over weights, gradients and moments.
        predict_all: predict every patch, as the published code does, not the removed ones alone.
        compile: torch.compile each block.
        recompute: see `cavmae.trainer.config.configs.EngineConfig.activation_checkpointing`.
    """

    attention: AttentionBackend | None = None
    fused_update: bool = True
    predict_all: bool = False
    compile: bool = False
    recompute: Recompute = "selective"


AS_RUNS_DO = Choices()


class MasterAdam:
    """Adam on float32 copies of bfloat16 parameters, slice by slice: float32 gradients exist for
    one slice at a time."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, fused: bool = True) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self._slices: list[tuple[list[int], torch.optim.Adam]] = []
        members: list[int] = []
        for index, master in enumerate(self.masters):
            members.append(index)
            elements = sum(self.masters[member].numel() for member in members)
            if elements >= SLICE_ELEMENTS or master is self.masters[-1]:
                adam = _adam([self.masters[member] for member in members], fused=fused)
                self._slices.append((members, adam))
                members = []

    def step(self) -> None:
        for members, adam in self._slices:
            used = [m for m in members if self.parameters[m].grad is not None]
            for member in used:
                gradient = self.parameters[member].grad
                assert gradient is not None
                self.masters[member].grad = gradient.float()
            adam.step()
            with torch.no_grad():
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [self.parameters[m] for m in used], [self.masters[m] for m in used]
                )
            adam.zero_grad()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def _adam(parameters: list[nn.Parameter] | list[torch.Tensor], *, fused: bool) -> torch.optim.Adam:
    return torch.optim.Adam(
        parameters,
        lr=LEARNING_RATE,
        betas=(0.95, 0.999),
        weight_decay=5e-7,
        fused=fused or None,  # None: as torch chooses, which is what the published code gets
    )


@dataclass(frozen=True)
class StepSetting:
    """What a step trains.

    Attributes:
        name: `cavmae` (ours) or `published` (the baseline).
        config: sizes of the model.
        batch: samples.
        precision: `fp32` (TF32 stays as the process has it) or `bf16`.
        device: where everything lives.
        choices: of our model; the baseline has none.
    """

    name: ModelName
    config: ModelConfig
    batch: int
    precision: Precision
    device: torch.device
    choices: Choices = AS_RUNS_DO


class TrainingStep:
    """A model with its optimizer and a fixed batch; calling it trains one step.

    Its `timeline`, where one is given, has the `PARTS` of each step.

    In bf16 our model holds bf16 parameters beside float32 masters, as it does under the engine; the
    baseline runs under autocast, as the published code does.
    """

    def __init__(self, setting: StepSetting) -> None:
        torch.manual_seed(0)
        config, batch, device = setting.config, setting.batch, setting.device
        self.config, self.batch, self.device = config, batch, device
        self.position, self.choices = 0, setting.choices
        self.timeline: Timeline | None = None
        self.log_mel = torch.randn(batch, config.audio_frames, config.mel_bins, device=device)
        self.frame = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        bf16, ours = setting.precision == "bf16", setting.name == "cavmae"
        self.autocast = bf16 and not ours
        if not ours:
            self.model: nn.Module = PublishedCAVMAE(config).to(device)
        else:
            model = CAVMAE(config)
            model.freeze_unused(reconstruct=True, contrast=True)
            self.model = model.to(device, torch.bfloat16 if bf16 else torch.float32)
            model.use_attention(self.choices.attention)
            model.recompute_blocks(self.choices.recompute)
            if self.choices.compile:
                model.compile_blocks()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if bf16 and not self.autocast:
            self.optimizer = MasterAdam(trained, fused=self.choices.fused_update)
        else:
            fused = ours and self.choices.fused_update
            self.optimizer = _adam(trained, fused=fused)

    def __call__(self) -> torch.Tensor:
        """Train one step and return its loss, a detached scalar on the device."""
        self._now("forward")
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self._loss()
        self._now("backward")
        loss.backward()
        self._now("update")
        self.optimizer.step()
        self._now("between steps")
        self.position += self.batch
        return loss.detach()

    def _now(self, part: str) -> None:
        if self.timeline:
            begin = self.timeline.begin_step if part == PARTS[0] else self.timeline.switch
            begin(Label(part))

    def _loss(self) -> torch.Tensor:
        if isinstance(self.model, PublishedCAVMAE):
            return self.model(self.log_mel, self.frame, contrastive_weight=CONTRASTIVE_WEIGHT).loss
        positions = torch.arange(self.position, self.position + self.batch, device=self.device)
        masks = random_masks(self.config, MaskConfig(), positions, seed=0)
        output = self.model(self.log_mel, self.frame, *masks, predict_all=self.choices.predict_all)
        contrast = contrastive_loss(
            output.audio_embedding, output.video_embedding, TEMPERATURE, False
        )
        reconstruction = output.reconstruction_audio + output.reconstruction_video
        return reconstruction + CONTRASTIVE_WEIGHT * contrast.loss


def part_seconds(timeline: Timeline, steps: int) -> dict[str, list[float]]:
    """Return the seconds of each of the last steps of a timeline, by part."""
    timeline.begin_step(Label("end"))  # a step has ended where another one begins
    last = timeline.seconds()[-steps:]
    return {part: [seconds[Label(part)] for seconds in last] for part in PARTS}


def timed(step: TrainingStep, device: torch.device) -> tuple[float, float]:
    """Return seconds and loss of one step, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, float(loss)


def timed_in_turn(
    steps: Mapping[str, TrainingStep],
    repeats: int,
    device: torch.device,
    after_round: Callable[[], object] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time steps in turn; the first one changes, so that neither of two always follows the other.

    Args:
        steps: by name.
        repeats: rounds.
        device: of the steps.
        after_round: called after each round, for what must see the machine as the steps do.

    Returns:
        Seconds of each repeat and the last loss, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for repeat in range(repeats):
        for name in list(steps)[:: 1 if repeat % 2 else -1]:
            elapsed, losses[name] = timed(steps[name], device)
            seconds[name].append(elapsed)
        after_round()
    return seconds, losses
