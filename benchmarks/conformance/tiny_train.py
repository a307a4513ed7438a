"""Training equivalence: ten steps of the published code on a small model, to be repeated.

`TinyTrain` needs no engine, so any way of training (plain torch, every ZeRO stage, any number of
ranks) can be compared with the same history and the same final parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from cavmae.benchmarks.conformance.cases import (
    config_from_arguments,
    fill_from_recipe,
    mask_on,
    read_json,
    recipe_inputs,
)
from cavmae.benchmarks.conformance.tolerances import (
    LIMITS,
    Deviation,
    mismatches,
    relative,
    sum_deviation,
)
from cavmae.kernels import MaskIds, contrastive_loss, mask_ids_from_shuffle
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import ModelConfig

TEMPERATURE = 0.05


class TinyLosses(NamedTuple):
    """Losses of one step; `total` is the one to differentiate, `contrast` includes its weight."""

    total: torch.Tensor
    reconstruction_audio: torch.Tensor
    reconstruction_video: torch.Tensor
    contrast: torch.Tensor
    accuracy: torch.Tensor

    def row(self, gradient_norm: float | None) -> list[float | None]:
        """The columns of the history."""
        return [*(float(loss.detach()) for loss in self), gradient_norm]


@dataclass(frozen=True)
class TinyTrain:
    """One run of `tiny_train` in a golden folder.

    Attributes:
        name: the run's file name without `.json`.
        record: the parsed file.
        ids_shuffle_a: (steps + 1, batch, audio tokens) masks of each step and of the last forward.
        ids_shuffle_v: (steps + 1, batch, video tokens).
    """

    name: str
    record: Mapping[str, Any]
    ids_shuffle_a: np.ndarray = field(repr=False)
    ids_shuffle_v: np.ndarray = field(repr=False)

    @staticmethod
    def all(folder: Path) -> "list[TinyTrain]":
        """Load the runs of a golden folder; empty where it has none."""
        return [TinyTrain.load(path) for path in sorted(folder.glob("tiny_train/*.json"))]

    @staticmethod
    def load(path: Path) -> "TinyTrain":
        """Load a run from its JSON file, which has its masks beside it."""
        with np.load(path.with_name(f"{path.stem}_masks.npz")) as masks:
            shuffles = masks["ids_shuffle_a"], masks["ids_shuffle_v"]
        return TinyTrain(path.stem, read_json(path), *shuffles)

    @property
    def config(self) -> ModelConfig:
        return config_from_arguments(self.record["model"])

    @property
    def steps(self) -> int:
        """Updates; the history has one row more."""
        return self.record["steps"]

    @property
    def batch(self) -> int:
        return self.record["batch"]

    @property
    def norm_pix(self) -> bool:
        return self.record["model"].get("norm_pix_loss", False)

    @cached_property
    def initial_state(self) -> dict[str, torch.Tensor]:
        """The weights that training starts from."""
        return self.build().state_dict()

    def build(self) -> CAVMAE:
        """A model with the initial weights; parameters that no loss uses are frozen."""
        model = CAVMAE(self.config)
        fill_from_recipe(model, self.record["seed"])
        model.freeze_unused(
            reconstruct=self.record["mae_loss_weight"] != 0,
            contrast=self.record["contrast_loss_weight"] != 0,
        )
        return model

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Adam:
        """The published Adam: decay is added to the gradient."""
        adam = self.record["adam"]
        return torch.optim.Adam(
            parameters,
            lr=self.record["lr"],
            betas=tuple(adam["betas"]),
            eps=adam["eps"],
            weight_decay=adam["weight_decay"],
        )

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, audio_frames, mel_bins) log-mel and (batch, 3, side, side) image, every step's
        batch."""
        return recipe_inputs(self.batch, self.config, self.record["seed"])

    def masks(self, step: int, device: torch.device | str = "cpu") -> tuple[MaskIds, MaskIds]:
        """Audio and video masks of a step; step `steps` is the forward after the last update."""
        audio, video = (
            mask_ids_from_shuffle(torch.from_numpy(shuffle[step]), self.record["mask_ratio"])
            for shuffle in (self.ids_shuffle_a, self.ids_shuffle_v)
        )
        return mask_on(audio, device), mask_on(video, device)

    def losses(
        self,
        model: nn.Module,
        log_mel: torch.Tensor,
        image: torch.Tensor,
        masks: tuple[MaskIds, MaskIds],
    ) -> TinyLosses:
        """One forward pass on one rank, all tensors on its device."""
        output = model(log_mel, image, *masks, norm_pix=self.norm_pix)
        contrast = contrastive_loss(
            output.audio_embedding, output.video_embedding, TEMPERATURE, False
        )
        weighted = self.record["contrast_loss_weight"] * contrast.loss
        reconstruction = output.reconstruction_audio + output.reconstruction_video
        return TinyLosses(
            self.record["mae_loss_weight"] * reconstruction + weighted,
            output.reconstruction_audio,
            output.reconstruction_video,
            weighted,
            contrast.accuracy,
        )

    def train(
        self, model: nn.Module, device: torch.device | str = "cpu"
    ) -> list[list[float | None]]:
        """Repeat the run in plain torch.

        Args:
            model: what `build` returned; trained in place and moved to `device`.

        Returns:
            The history, one row a step and one more for the forward after the last update.
        """
        model.to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.optimizer(iter(trained))
        log_mel, image = (tensor.to(device) for tensor in self.inputs())
        history = []
        for step in range(self.steps):
            losses = self.losses(model, log_mel, image, self.masks(step, device))
            optimizer.zero_grad(set_to_none=True)
            losses.total.backward()
            gradients = [p.grad for p in trained if p.grad is not None]
            history.append(losses.row(float(torch.nn.utils.get_total_norm(gradients))))
            optimizer.step()
        with torch.no_grad():
            losses = self.losses(model, log_mel, image, self.masks(self.steps, device))
        history.append(losses.row(None))
        return history

    def train_deviations(self, device: torch.device | str = "cpu") -> list[Deviation]:
        """Repeat the run in plain torch and compare masks, history and final parameters."""
        model = self.build()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        history = self.train(model, device)
        return [
            *self.check_masks(),
            *self.check_history(history),
            *self.check_final(model.state_dict()),
            frozen_deviation(self.record, frozen),
        ]

    def check_masks(self) -> list[Deviation]:
        """Compare every row of the mask file with a permutation of the patches."""
        return [
            mismatches(
                f"{letter} masks are no permutations",
                np.sort(shuffle, axis=2),
                np.broadcast_to(np.arange(tokens), (self.steps + 1, self.batch, tokens)),
            )
            for letter, shuffle, tokens in (
                ("audio", self.ids_shuffle_a, self.config.audio_tokens),
                ("video", self.ids_shuffle_v, self.config.video_tokens),
            )
        ]

    def check_history(
        self, history: Sequence[Sequence[float | None]], columns: Sequence[str] | None = None
    ) -> list[Deviation]:
        """A history against the recorded one, in float32 and in float64.

        Args:
            history: a row per step and one for the forward after the last update, or fewer rows.
            columns: what the rows hold, the first ones of the record's columns; None: all.
        """
        names = list(columns or self.record["columns"])
        deviations = []
        if columns is None and len(history) != self.steps + 1:
            deviations.append(Deviation(f"history of {len(history)} rows", float("inf"), 0))
        for kind in ("history", "history_float64"):
            if kind not in self.record:
                continue
            for step, (row, recorded) in enumerate(zip(history, self.record[kind], strict=False)):
                expected_row = dict(zip(self.record["columns"], recorded, strict=True))
                for name, measured in zip(names, row, strict=True):
                    quantity = f"{kind} step {step} {name}"
                    deviations.append(_history_deviation(quantity, measured, expected_row[name]))
        return deviations

    def check_final(self, state: Mapping[str, torch.Tensor]) -> list[Deviation]:
        """Trained parameters against the recorded ones.

        Args:
            state: full tensors in float32 under the published names.
        """
        return final_deviations(self.record, state, self.initial_state)


def frozen_deviation(record: Mapping[str, Any], frozen: set[str]) -> Deviation:
    """Compare the frozen parameters with those that the published training left unchanged."""
    recorded = frozen & record["final_parameters"].keys()
    return Deviation("frozen parameters", len(recorded ^ set(record["unchanged_parameters"])), 0)


def final_deviations(
    record: Mapping[str, Any],
    state: Mapping[str, torch.Tensor],
    initial_state: Mapping[str, torch.Tensor],
) -> list[Deviation]:
    """Trained parameters against those of a training record.

    Args:
        record: its `final_parameters`, and the `unchanged_parameters` that stay bit for bit.
        state: full tensors in float32 under the published names.
        initial_state: the same before training.
    """
    final = record["final_parameters"]
    deviations = []
    for name in record["unchanged_parameters"]:
        measured, initial = state[name].cpu().numpy(), initial_state[name].numpy()
        deviations.append(mismatches(f"{name} unchanged", measured, initial))
    for name, expected in final.items():
        values = state[name].detach().cpu().double().flatten()
        sample = values[:: max(1, len(values) // 16)][:16]
        difference = np.abs(sample.numpy() - np.array(expected["sample16"])).max()
        deviations += [
            Deviation(f"{name} sample16", float(difference), LIMITS.training_value),
            sum_deviation(
                f"{name} sum",
                float(values.sum()),
                expected["sum"],
                expected["l2"],
                LIMITS.training_sum,
            ),
        ]
        parts = {"l2": values, "l2_float64": values}
        if "l2_q" in expected:
            parts |= dict(zip(("l2_q", "l2_k", "l2_v"), values.chunk(3), strict=True))
        deviations += [
            relative(f"{name} {key}", float(part.norm()), expected[key], LIMITS.training_norm)
            for key, part in parts.items()
            if key in expected
        ]
    return deviations


def _history_deviation(quantity: str, measured: float | None, expected: float | None) -> Deviation:
    if measured is None or expected is None:
        present = (measured is not None) + (expected is not None)
        return Deviation(f"{quantity} on one side only", present, 0)
    if quantity.endswith("c_acc"):
        return Deviation(quantity, abs(measured - expected), LIMITS.accuracy)
    if quantity.endswith("grad_norm_all"):
        return relative(quantity, measured, expected, LIMITS.gradient_norm)
    return relative(quantity, measured, expected, LIMITS.training_loss)
