"""The published fine-tuning model, compared with ours: every mode, gradients, eight training steps.

Weights and inputs come from the recipe of the golden folder, as those of pretraining do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch

from cavmae.benchmarks.conformance.cases import (
    config_from_arguments,
    fill_from_recipe,
    noise,
    read_json,
    recipe_inputs,
)
from cavmae.benchmarks.conformance.forward import GoldenCase, gradient_deviations
from cavmae.benchmarks.conformance.tiny_train import final_deviations, frozen_deviation
from cavmae.benchmarks.conformance.tolerances import (
    LIMITS,
    Deviation,
    array_deviation,
    check_deviations,
    recorded_deviation,
    relative,
)
from cavmae.trainer.losses.classification import LossName, classification_loss
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import STREAMS, CAVMAEClassifier, Mode
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.weights import published_state

LOSSES: dict[str, LossName] = {"BCE": "bce", "CE": "cross_entropy"}


def recipe_targets(clips: int, classes: int, seed: int, threshold: float) -> torch.Tensor:
    """(clips, classes) float32 labels, 1 where noise is above the threshold."""
    return torch.from_numpy(noise("target", (clips, classes), seed) > threshold).float()


class FinetuneCase(GoldenCase):
    """One case of fine-tuning."""

    part = "finetune_forward"

    @cached_property
    def config(self) -> ModelConfig:
        arguments = {"audio_length": self.entry["audio_length"]}
        return config_from_arguments(arguments | self.entry.get("model", {}))

    def build(self, *, video: bool = True) -> CAVMAEClassifier:
        """The model, or the audio-only one, with the weights of this case."""
        model = CAVMAEClassifier(self.config, self.entry["label_dim"], video=video)
        fill_from_recipe(model, self.entry["seed"], self.entry["pos"])
        return model

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel and image, float32."""
        return recipe_inputs(self.entry["batch"], self.config, self.entry["seed"])

    def targets(self) -> torch.Tensor:
        """(batch, classes) float32."""
        entry = self.entry
        return recipe_targets(entry["batch"], entry["label_dim"], entry["seed"], threshold=1.5)

    def input_deviations(self) -> list[Deviation]:
        """Inputs and targets against their recorded check values."""
        targets = check_deviations("targets", self.targets(), self.entry["target_check"])
        return super().input_deviations() + targets

    def run(self, model: CAVMAEClassifier) -> dict[str, torch.Tensor]:
        """Logits of every mode, `logits_<mode>`, tokens of both streams, `feat_a` and `feat_v`
        (batch, tokens, width), and their means, without gradients."""
        audio, image = self.inputs()
        with torch.no_grad():
            outputs = {mode: model(audio, image, mode) for mode in STREAMS}
            return {f"logits_{mode}": output.logits for mode, output in outputs.items()} | {
                "feat_a": model.audio_tokens(audio),
                "feat_v": model.video_tokens(image),
                "feat_a_mean": outputs["audioonly"].embedding,
                "feat_v_mean": outputs["videoonly"].embedding,
            }

    def deviations(self, arrays: Mapping[str, torch.Tensor]) -> list[Deviation]:
        """Every recorded array but that of the audio-only model, which is a model of its own."""
        return [
            recorded_deviation(key, key, arrays, expected)
            for key, expected in self.files.items()
            if key != "logits_audio_model"
        ]

    def forward_deviations(self) -> list[Deviation]:
        """Compare every mode, the audio-only model, and the features of the pretraining model,
        whose encoders have the names, hence the recipe weights, of this one's."""
        audio, image = self.inputs()
        encoders = CAVMAE(self.config)
        fill_from_recipe(encoders, self.entry["seed"], self.entry["pos"])
        with torch.no_grad():
            others = {
                "logits_audio_model": self.build(video=False)(audio, None, "audioonly").logits,
                "feat_a_mean": encoders.embed_audio(audio),
                "feat_v_mean": encoders.embed_video(image),
            }
        return self.deviations(self.run(self.build())) + [
            array_deviation(f"{key}, alone", value, self.files[key], LIMITS.array)
            for key, value in others.items()
        ]

    def shape_deviations(self) -> list[Deviation]:
        """Compare names and shapes of the parameters, here and in the published file format."""
        with torch.device("meta"):
            model = CAVMAEClassifier(self.config, self.entry["label_dim"])
        shapes = read_json(self.folder / self.part / f"{self.name}_shapes.json")
        expected = {name: tuple(shape) for name, shape in shapes.items()}
        # The published files were saved under DataParallel.
        exported = {f"module.{name}": shape for name, shape in expected.items()}
        return [
            Deviation(f"{what} names and shapes", len(shapes.items() ^ _shapes_of(state)), 0)
            for what, shapes, state in (
                ("parameter", expected, model.state_dict()),
                ("exported", exported, published_state(model)),
            )
        ]

    def gradient_deviations(self, model: CAVMAEClassifier) -> list[Deviation]:
        """Both losses in the multimodal mode, and the gradient of binary cross-entropy by every
        parameter."""
        targets = self.targets()
        model.zero_grad(set_to_none=True)
        logits = model(*self.inputs()).logits
        losses = {name: classification_loss(logits, targets, name) for name in LOSSES.values()}
        losses["bce"].backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        recorded = {"bce": "bce", "cross_entropy": "ce_prob_targets"}
        return [
            relative(key, losses[name].item(), self.gradients[key], LIMITS.loss)
            for name, key in recorded.items()
        ] + gradient_deviations(gradients, self.gradients["grad"])


def _shapes_of(state: Mapping[str, torch.Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in state.items()}


@dataclass(frozen=True)
class FinetuneTraining:
    """One training run of `finetune_forward`.

    Attributes:
        record: the parsed file.
    """

    record: Mapping[str, Any]

    def build(self) -> CAVMAEClassifier:
        """A model with the initial weights; parameters that the mode does not use are frozen."""
        arguments = self.record["model"]
        model = CAVMAEClassifier(config_from_arguments(arguments), arguments["label_dim"])
        fill_from_recipe(model, self.record["seed"])
        model.freeze_unused(self.mode)
        return model

    @property
    def mode(self) -> Mode:
        return cast(Mode, self.record["mode"])

    def inputs(self, model: CAVMAEClassifier) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel and image, float32."""
        return recipe_inputs(self.record["batch"], model.config, self.record["seed"])

    def targets(self, model: CAVMAEClassifier) -> torch.Tensor:
        """(batch, classes) float32."""
        record = self.record
        return recipe_targets(record["batch"], model.classes, record["seed"], threshold=1.0)

    def train(self, model: CAVMAEClassifier) -> list[float]:
        """Repeat the run in plain torch.

        Args:
            model: what `build` returned; trained in place.

        Returns:
            The loss before each update, and after the last.
        """
        record = self.record
        encoders, head = model.parameter_groups()
        optimizer = torch.optim.Adam(
            [
                {"params": encoders, "lr": record["lr"]},
                {"params": head, "lr": record["lr"] * record["head_lr"]},
            ],
            betas=(0.95, 0.999),
            weight_decay=5e-7,
        )
        inputs, targets = self.inputs(model), self.targets(model)
        history = []
        for step in range(record["steps"] + 1):
            logits = model(*inputs, self.mode).logits
            loss = classification_loss(logits, targets, LOSSES[record["loss"]])
            history.append(loss.item())
            if step < record["steps"]:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        return history

    def deviations(
        self, history: list[float], state: Mapping[str, torch.Tensor]
    ) -> list[Deviation]:
        """A history in float32 and float64, and the trained parameters, against the record."""
        deviations = [Deviation("rows", abs(len(history) - self.record["steps"] - 1), 0)]
        for kind in ("history", "history_float64"):
            deviations += [
                relative(f"{kind} step {step}", measured, expected, LIMITS.training_loss)
                for step, (measured, expected) in enumerate(
                    zip(history, self.record[kind], strict=True)
                )
            ]
        initial = self.build()
        frozen = {name for name, p in initial.named_parameters() if not p.requires_grad}
        deviations += final_deviations(self.record, state, initial.state_dict())
        return [*deviations, frozen_deviation(self.record, frozen)]
