"""One training step (forward, backward, update) of our model or of the baseline, without engine.

Inputs are random and fixed; masks are drawn anew in every step, as in training.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from cavmae.benchmarks.baselines.published import PublishedCAVMAE
from cavmae.kernels import contrastive_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.masking import random_masks

Precision = Literal["fp32", "bf16"]
ModelName = Literal["cavmae", "published"]

LEARNING_RATE = 1e-4
CONTRASTIVE_WEIGHT = 0.01
TEMPERATURE = 0.05


class MasterAdam:
    """Adam on float32 copies of bfloat16 parameters, as an engine's bf16 mode updates them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters]
        self.adam = _adam(self.masters, fused=True)

    def step(self) -> None:
        used = [
            (p, master)
            for p, master in zip(self.parameters, self.masters, strict=True)
            if p.grad is not None
        ]
        for parameter, master in used:
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [parameter for parameter, _ in used], [master for _, master in used]
            )

    def zero_grad(self) -> None:
        for tensor in self.parameters + self.masters:
            tensor.grad = None


def _adam(parameters: list[nn.Parameter] | list[torch.Tensor], *, fused: bool) -> torch.optim.Adam:
    return torch.optim.Adam(
        parameters,
        lr=LEARNING_RATE,
        betas=(0.95, 0.999),
        weight_decay=5e-7,
        fused=fused or None,  # None: as torch chooses, which is what the published code gets
    )


class TrainingStep:
    """A model with its optimizer and a fixed batch; calling it trains one step.

    In bf16 our model holds bf16 parameters beside float32 masters, as it does under the engine; the
    baseline runs under autocast, as the published code does.

    Args:
        name: `cavmae` (ours) or `published` (the baseline).
        config: sizes of the model.
        batch: samples.
        precision: `fp32` (TF32 stays as the process has it) or `bf16`.
        device: where everything lives.
        compile: torch.compile each block of our model.
    """

    def __init__(
        self,
        name: ModelName,
        config: ModelConfig,
        batch: int,
        precision: Precision,
        device: torch.device,
        *,
        compile: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.device = config, batch, device
        self.position = 0
        self.log_mel = torch.randn(batch, config.audio_frames, config.mel_bins, device=device)
        self.frame = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
        bf16 = precision == "bf16"
        self.autocast = bf16 and name == "published"
        if name == "published":
            self.model: nn.Module = PublishedCAVMAE(config).to(device)
        else:
            model = CAVMAE(config)
            model.freeze_unused(reconstruct=True, contrast=True)
            self.model = model.to(device, torch.bfloat16 if bf16 else torch.float32)
            if compile:
                for module in self.model.modules():
                    if isinstance(module, nn.ModuleList):
                        for block in module:
                            block.compile()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if bf16 and not self.autocast:
            self.optimizer = MasterAdam(trained)
        else:
            self.optimizer = _adam(trained, fused=name == "cavmae")

    def __call__(self) -> torch.Tensor:
        """Train one step and return its loss, a detached scalar on the device."""
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.position += self.batch
        return loss.detach()

    def _loss(self) -> torch.Tensor:
        if isinstance(self.model, PublishedCAVMAE):
            return self.model(self.log_mel, self.frame, contrastive_weight=CONTRASTIVE_WEIGHT).loss
        positions = torch.arange(self.position, self.position + self.batch, device=self.device)
        masks = random_masks(self.config, positions, seed=0, audio_ratio=0.75, video_ratio=0.75)
        output = self.model(self.log_mel, self.frame, *masks)
        contrast = contrastive_loss(
            output.audio_embedding, output.video_embedding, TEMPERATURE, False
        )
        reconstruction = output.reconstruction_audio + output.reconstruction_video
        return reconstruction + CONTRASTIVE_WEIGHT * contrast.loss
