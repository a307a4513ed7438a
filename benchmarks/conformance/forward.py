"""Forward passes and gradients of the published model, compared with a model of ours.

One `ForwardCase` is an entry of `pretrain_forward/index.json` of a golden folder: weights and
inputs from the recipe, masks from the file, outputs and (in some cases) gradients to be met.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from cavmae.benchmarks.conformance.cases import (
    config_from_arguments,
    config_from_shapes,
    fill_from_recipe,
    mask_on,
    read_json,
    recipe,
    recipe_inputs,
)
from cavmae.benchmarks.conformance.tolerances import (
    LIMITS,
    Deviation,
    array_deviation,
    check_deviations,
    mismatches,
    recorded_deviation,
    relative,
    sum_deviation,
    value_deviation,
)
from cavmae.kernels import MaskIds, contrastive_loss, mask_ids_from_shuffle
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

TEMPERATURE = 0.05
# Gradients with a norm below this are rounding noise.
NOISE = 1e-9


@dataclass
class ForwardNumbers:
    """Numbers that a model computed for one case, by the names of the golden files.

    Attributes:
        arrays: `latent`, `ca`, `cv` (batch, tokens, width), `ca_mean`, `cv_mean` (batch, width),
            `pred_a`, `pred_v` (batch, patches, pixels); those that the case has.
        scalars: `loss`, `loss_mae`, `nce_single`, ...
    """

    arrays: dict[str, torch.Tensor]
    scalars: dict[str, float]


@dataclass(frozen=True)
class GoldenCase:
    """One case of a part of a golden folder.

    Attributes:
        folder: the golden folder.
        entry: the case's entry in the index.
    """

    folder: Path
    entry: Mapping[str, Any]
    part: ClassVar[str]

    @classmethod
    def all(cls, folder: Path) -> Sequence[Self]:
        """The cases of a folder; empty without an index."""
        index = folder / cls.part / "index.json"
        return [cls(folder, entry) for entry in read_json(index)] if index.exists() else []

    @property
    def name(self) -> str:
        return Path(self.entry["file"]).stem

    @property
    def has_gradients(self) -> bool:
        return "grad_file" in self.entry

    @cached_property
    def files(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / self.entry["file"]) as arrays:
            return dict(arrays)

    @cached_property
    def gradients(self) -> dict[str, Any]:
        """Their check values, and losses that belong to them."""
        return read_json(self.folder / self.entry["grad_file"])

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel and image, float32."""
        raise NotImplementedError

    def input_deviations(self) -> list[Deviation]:
        """The inputs against their recorded check values."""
        checks = self.entry["input_check"]
        audio, image = self.inputs()
        return [
            *check_deviations("input audio", audio, checks["audio"]),
            *check_deviations("input image", image, checks["image"]),
        ]


class ForwardCase(GoldenCase):
    """One case of pretraining."""

    part = "pretrain_forward"

    @classmethod
    def all(cls, folder: Path) -> Sequence[Self]:
        """The cases of a folder, those that share weights together; empty without an index."""
        return sorted(super().all(folder), key=lambda case: str(case.weights))

    @cached_property
    def weights_check(self) -> Path | None:
        """File with the shapes and check values of this case's weights, where there is one."""
        name = f"weights_seed{self.entry['seed']}_T{self.entry['audio_length']}"
        path = self.folder / self.part / f"{name}_{self.entry['pos']}_check.json"
        return path if path.exists() else None

    @cached_property
    def config(self) -> ModelConfig:
        """Sizes: constructor arguments in the entry, else the weights' shapes, else published."""
        if "model" in self.entry or self.weights_check is None:
            arguments = {key: self.entry[key] for key in ("audio_length", "tr_pos")}
            return config_from_arguments(arguments | self.entry.get("model", {}))
        sizes = config_from_shapes(read_json(self.weights_check)["shapes"])
        return replace(sizes, learnable_positions=self.entry["tr_pos"])

    @property
    def weights(self) -> tuple[int, str, ModelConfig]:
        """Cases for which this is equal share one model."""
        return self.entry["seed"], self.entry["pos"], self.config

    def fill(self, model: nn.Module) -> None:
        """Give a new model, its position tables as constructed, the weights of this case."""
        fill_from_recipe(model, self.entry["seed"], self.entry["pos"])

    def build(self) -> CAVMAE:
        """The model with the weights of this case."""
        model = CAVMAE(self.config)
        self.fill(model)
        return model

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mel and image, float32."""
        entry = self.entry
        return recipe_inputs(entry["batch"], self.config, entry["seed"], entry["input_scale"])

    def masks(self) -> tuple[MaskIds, MaskIds]:
        """Audio and video masks."""
        audio, video = (
            mask_ids_from_shuffle(
                torch.from_numpy(self.files[f"ids_shuffle_{letter}"]),
                self.entry[f"mask_ratio_{letter}"],
            )
            for letter in "av"
        )
        return audio, video

    def mask_deviations(self) -> list[Deviation]:
        """The mask arrays against each other, and against the marked rows and columns."""
        deviations = []
        for letter, mask in zip("av", self.masks(), strict=True):
            files = {key: self.files[f"{key}_{letter}"] for key in ("ids_shuffle", "ids_restore")}
            tokens = files["ids_shuffle"].shape[1]
            deviations += [
                mismatches(
                    f"ids_shuffle_{letter} is no permutation",
                    np.sort(files["ids_shuffle"], axis=1),
                    np.broadcast_to(np.arange(tokens), files["ids_shuffle"].shape),
                ),
                mismatches(f"ids_restore_{letter}", mask.restore.numpy(), files["ids_restore"]),
                mismatches(
                    f"mask_{letter}",
                    (mask.restore >= mask.keep.shape[1]).numpy(),
                    self.files[f"mask_{letter}"],
                ),
            ]
        if self.entry["mask_mode"] != "unstructured":
            deviations.append(self._structure_deviation())
        return deviations

    def _structure_deviation(self) -> Deviation:
        """Patches on the wrong side: marked ones go first, and what is left decides the count."""
        mode, batch = self.entry["mask_mode"], self.entry["batch"]
        rows, columns = self.config.audio_grid
        ratio = self.entry["mask_ratio_a"] * (0.7 if mode == "tf" else 1)
        drawn = [np.array(ids) for ids in self.entry["structured_masked_columns_or_rows_per_call"]]
        marked_columns = drawn[:batch] if mode != "freq" else []
        marked_rows = drawn[-batch:] if mode != "time" else []
        wrong = abs(len(drawn) - batch * (2 if mode == "tf" else 1))
        marked = np.zeros((batch, rows, columns), bool)
        for sample, ids in enumerate(marked_columns):
            wrong += len(np.unique(ids)) != int(columns * ratio)
            marked[sample, :, ids] = True
        for sample, ids in enumerate(marked_rows):
            wrong += len(np.unique(ids)) != int(rows * ratio)
            marked[sample, ids] = True
        removed = self.files["mask_a"].reshape(marked.shape).astype(bool)
        for is_marked, is_removed in zip(marked, removed, strict=True):
            wrong += min((is_marked & ~is_removed).sum(), (is_removed & ~is_marked).sum())
        return Deviation("structured mask", float(wrong), 0)

    def run(self, model: CAVMAE, device: torch.device | str = "cpu") -> ForwardNumbers:
        """Everything the case records, from one forward pass without gradients."""
        with torch.no_grad():
            output = self._forward(model, device, predict_all=True)
        arrays = {
            "latent": output.latent,
            "ca": output.audio_tokens,
            "cv": output.video_tokens,
            "ca_mean": output.audio_embedding,
            "cv_mean": output.video_embedding,
            "pred_a": output.predicted_audio,
            "pred_v": output.predicted_video,
        }
        return self.numbers(arrays, output.reconstruction_audio, output.reconstruction_video)

    def _forward(self, model: CAVMAE, device: torch.device | str, **options: bool) -> Any:
        log_mel, image = (tensor.to(device) for tensor in self.inputs())
        masks = [mask_on(mask, device) for mask in self.masks()]
        return model(log_mel, image, *masks, norm_pix=self.entry["norm_pix_loss"], **options)

    def numbers(
        self, arrays: dict[str, torch.Tensor], loss_mae_a: torch.Tensor, loss_mae_v: torch.Tensor
    ) -> ForwardNumbers:
        """Weights and adds the losses as the published forward returns them."""
        mae_weight, contrast_weight = self._loss_weights()
        single = contrastive_loss(arrays["ca_mean"], arrays["cv_mean"], TEMPERATURE, False)
        both = contrastive_loss(arrays["ca_mean"], arrays["cv_mean"], TEMPERATURE, True)
        loss_mae = mae_weight * (loss_mae_a + loss_mae_v)
        loss_c = contrast_weight * single.loss
        scalars = {
            "loss": loss_mae + loss_c,
            "loss_float64": loss_mae + loss_c,
            "loss_mae": loss_mae,
            "loss_mae_a": loss_mae_a if mae_weight else 0.0,
            "loss_mae_v": loss_mae_v if mae_weight else 0.0,
            "loss_c": loss_c,
            "c_acc": single.accuracy if contrast_weight else 0.0,
            "nce_single": single.loss,
            "acc_single": single.accuracy,
            "nce_bidirect": both.loss,
            "acc_bidirect": both.accuracy,
        }
        return ForwardNumbers(arrays, {key: float(value) for key, value in scalars.items()})

    def deviations(self, numbers: ForwardNumbers) -> list[Deviation]:
        """Every scalar of the index and every scalar and array of the case's file.

        A recorded quantity that `numbers` lacks counts as an infinite deviation.
        """
        deviations = [
            self._deviation(f"index {key}", key, expected, numbers)
            for key, expected in self.entry["scalars"].items()
        ]
        masks = ("mask_", "ids_restore_", "ids_shuffle_")
        for key, expected in self.files.items():
            if not key.startswith(("grad.", *masks)):
                deviations.append(self._deviation(key, key, expected, numbers))
        return deviations

    @staticmethod
    def _deviation(quantity: str, key: str, expected: Any, numbers: ForwardNumbers) -> Deviation:
        if key.removesuffix("_s16") in numbers.arrays:
            return recorded_deviation(quantity, key, numbers.arrays, expected)
        if key not in numbers.scalars:
            return Deviation(f"{quantity} was not computed", float("inf"), 0)
        measured = numbers.scalars[key]
        if key in ("c_acc", "acc_single", "acc_bidirect"):
            return Deviation(quantity, abs(measured - float(expected)), LIMITS.accuracy)
        return relative(quantity, measured, float(expected), LIMITS.loss)

    def backward(self, model: CAVMAE, device: torch.device | str = "cpu") -> None:
        """Gradients of the weighted loss, left in `model`; unweighted parts are not computed."""
        mae_weight, contrast_weight = self._loss_weights()
        model.zero_grad(set_to_none=True)
        output = self._forward(
            model, device, reconstruct=mae_weight != 0, contrast=contrast_weight != 0
        )
        loss = torch.zeros((), device=device)
        if mae_weight:
            loss = loss + mae_weight * (output.reconstruction_audio + output.reconstruction_video)
        if contrast_weight:
            contrast = contrastive_loss(
                output.audio_embedding, output.video_embedding, TEMPERATURE, False
            )
            loss = loss + contrast_weight * contrast.loss
        loss.backward()

    def gradient_deviations(self, model: nn.Module) -> list[Deviation]:
        """The gradients in `model` against the gradient file and the corners in the case's file."""
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        deviations = gradient_deviations(gradients, self.gradients)
        for key, expected in self.files.items():
            corner = re.match(r"grad\.(.+?)\[", key)
            if corner is None:
                continue
            gradient = gradients.get(corner[1])
            if gradient is None:
                deviations.append(Deviation(f"{corner[1]} has no gradient", float("inf"), 0))
                continue
            measured = gradient[: len(expected)].reshape(len(expected), -1)[:, : expected.shape[1]]
            deviations.append(
                array_deviation(f"{corner[1]} corner", measured, expected, LIMITS.gradient_norm)
            )
        return deviations

    def frozen_deviation(self) -> Deviation:
        """Compare the parameters that get frozen with those that have no published gradient."""
        with torch.device("meta"):
            model = CAVMAE(self.config)
        mae_weight, contrast_weight = self._loss_weights()
        model.freeze_unused(reconstruct=mae_weight != 0, contrast=contrast_weight != 0)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        without = {name for name, value in self.gradients.items() if value is None}
        return Deviation("frozen parameters", len(frozen ^ without), 0)

    def _loss_weights(self) -> tuple[float, float]:
        return self.entry["mae_loss_weight"], self.entry["contrast_loss_weight"]


class SharedModel:
    """Builds the model of a case, or returns the last one where the weights are the same."""

    def __init__(self) -> None:
        self._weights, self._model = None, None

    def __call__(self, case: ForwardCase) -> CAVMAE:
        if self._model is None or self._weights != case.weights:
            self._model = None  # a base model has 0.8 GB: keep one
            self._weights, self._model = case.weights, case.build()
        return self._model


def weights_deviations(path: Path) -> list[Deviation]:
    """Compare names, shapes and recipe values of parameters with a `weights_*_check.json`."""
    check = read_json(path)
    shapes = {name: tuple(shape) for name, shape in check["shapes"].items()}
    state = CAVMAE(config_from_shapes(shapes)).state_dict()
    wrong = shapes.items() ^ {(name, tuple(tensor.shape)) for name, tensor in state.items()}
    pattern = rf"weights_seed{check['seed']}_.*_{check['pos']}_check"
    misnamed = re.fullmatch(pattern, path.stem) is None
    deviations = [
        Deviation("names and shapes of parameters", len(wrong), 0),
        Deviation("seed and positions in the file's name", misnamed, 0),
    ]
    for name, expected in check["parameter_checks"].items():
        constructed = check["pos"] == "sincos" and "pos_embed" in name
        value = state[name] if constructed else recipe(name, shapes[name], check["seed"])
        deviations += check_deviations(name, value, expected)
    return deviations


def gradient_deviations(
    gradients: Mapping[str, torch.Tensor | None], expected: Mapping[str, Mapping[str, Any] | None]
) -> list[Deviation]:
    """Gradients by parameter against the recorded ones; None where a parameter has none."""
    deviations = [
        Deviation(f"parameters named {name}", 1, 0) for name in gradients.keys() ^ expected.keys()
    ]
    for name, recorded in expected.items():
        deviations += _gradient_deviations(name, gradients.get(name), recorded)
    return deviations


def _gradient_deviations(
    name: str, gradient: torch.Tensor | None, expected: Mapping[str, Any] | None
) -> list[Deviation]:
    """One parameter's gradient against its recorded norm, sum and first values."""
    if gradient is None or expected is None:
        present = (gradient is not None) + (expected is not None)
        return [Deviation(f"{name}: a gradient on one side only", present, 0)]
    values = gradient.detach().cpu().double().flatten()
    norm = float(values.norm())
    factor = LIMITS.gradient_cancelling if name in ("norm_a.bias", "norm_v.bias") else 1.0
    limit = LIMITS.gradient_norm * factor
    deviations = [
        relative(f"{name} {key}", norm, expected[key], limit)
        for key in ("l2", "l2_float64")
        if abs(expected.get(key, 0)) > NOISE
    ]
    if max(abs(expected["sum"]), norm) > NOISE:
        total, rms = float(values.sum()), norm / len(values) ** 0.5
        limit_sum = LIMITS.gradient_sum * factor
        deviations += [
            sum_deviation(f"{name} sum", total, expected["sum"], norm, limit_sum),
            value_deviation(
                f"{name} first4",
                values[:4].numpy(),
                expected["first4"],
                floor=rms / 5,
                limit=LIMITS.gradient_value * factor,
            ),
        ]
    if "l2_q" in expected:
        query, key, value = (float(part.norm()) for part in values.chunk(3))
        deviations += [
            relative(f"{name} l2_q", query, expected["l2_q"], limit),
            relative(f"{name} l2_v", value, expected["l2_v"], limit),
            # Softmax does not see what is added to all keys: only rounding noise is there.
            Deviation(f"{name} l2_k", key / expected["l2"], limit),
            Deviation(f"{name} reference l2_k", expected["l2_k"] / expected["l2"], limit),
        ]
    return deviations
