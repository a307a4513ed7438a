"""Weights of 1,024 frames start models of other sizes: positions computed or interpolated."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cavmae.dataloaders.batch import AudioVideoBatch
from cavmae.trainer.config.configs import ClassifierConfig, FinetuneConfig, PretrainConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.model.adapt_positions import adapt_positions, grid_of
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.pos_embed import position_table
from cavmae.trainer.model.weights import load_initial_weights, sizes_of
from cavmae.trainer.tasks.finetune import FinetuneTask
from cavmae.trainer.tasks.labels import LabelSet
from cavmae.trainer.tasks.pretrain import PretrainTask

LONG = ModelConfig(
    audio_frames=1024,
    mel_bins=128,
    image_size=64,
    width=32,
    modality_depth=1,
    joint_depth=1,
    heads=4,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)
CHANGES: list[dict[str, Any]] = [
    {"audio_frames": 512},
    {"audio_frames": 304},
    {"audio_frames": 2048},
    {"mel_bins": 64},
    {"image_size": 96},
    {"audio_frames": 304, "mel_bins": 80, "image_size": 32},
]
TABLES = ("pos_embed_a", "pos_embed_v", "decoder_pos_embed_a", "decoder_pos_embed_v")
Grid = tuple[int, int]
Logs = pytest.LogCaptureFixture


def saved(folder: Path, **changed: torch.Tensor) -> tuple[Path, dict[str, torch.Tensor]]:
    """Weights of the long model, with these tensors in place of its own."""
    torch.manual_seed(0)
    state = CAVMAE(LONG).state_dict() | changed
    torch.save(state, folder / "w.pth")
    return folder / "w.pth", state


def trained(width: int, grid: Grid) -> torch.Tensor:
    """A table as far from the fixed one as training moves it."""
    noise = torch.randn(1, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(1))
    return position_table(width, grid) + 0.1 * noise


def grids(name: str, sizes: ModelConfig) -> Grid:
    return sizes.audio_grid if name.endswith("_a") else sizes.video_grid


def sine_cosine(width: int, grid: Grid) -> np.ndarray:
    """The fixed table in float64, value by value."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.arange(width // 4) / (width / 4)
    parts = [
        wave(places[:, None] / 10000**angles)
        for places in (columns, rows)
        for wave in (np.sin, np.cos)
    ]
    return np.concatenate(parts, axis=1)


def bicubic(length: int, new: int) -> np.ndarray:
    """(new, length) weights of cubic convolution with a = -0.75 in float64; edges are repeated."""
    weights = np.zeros((new, length))
    for row in range(new):
        place = (row + 0.5) * length / new - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            x = abs(place - tap)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[row, min(max(tap, 0), length - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_fixed_tables_are_computed_and_all_else_is_the_checkpoints(
    tmp_path: Path, caplog: Logs, change: dict[str, Any]
) -> None:
    path, state = saved(tmp_path)
    sizes = replace(LONG, **change)
    model = CAVMAE(sizes)
    caplog.set_level(logging.INFO)
    load_initial_weights(model, path)
    for name, tensor in model.state_dict().items():
        if name in TABLES:
            expected = sine_cosine(tensor.shape[2], grids(name, sizes))
            np.testing.assert_allclose(tensor[0], expected, rtol=0, atol=1e-7)
        else:
            assert torch.equal(tensor, state[name]), name
    for name in TABLES:
        before, after = ("{} x {}".format(*grids(name, one)) for one in (LONG, sizes))
        line = f"{path}: {name} of {before} patches is fixed, and computed for {after}"
        assert (line in caplog.messages) == (before != after)


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_trained_tables_are_interpolated(
    tmp_path: Path, caplog: Logs, change: dict[str, Any]
) -> None:
    tables = {"pos_embed_a": trained(32, (8, 64)), "pos_embed_v": trained(32, (4, 4))}
    path, _ = saved(tmp_path, **tables)
    sizes = replace(LONG, **change)
    model = CAVMAEClassifier(sizes, classes=3)
    caplog.set_level(logging.INFO)
    load_initial_weights(model, path)
    for name, table in tables.items():
        before, after = grids(name, LONG), grids(name, sizes)
        rows, columns = (bicubic(*lengths) for lengths in zip(before, after, strict=True))
        values = table[0].double().numpy().reshape(*before, 32)  # (rows, columns, width)
        expected = np.einsum("rh,ct,htw->rcw", rows, columns, values).reshape(-1, 32)
        found = model.get_parameter(name)[0].detach()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        line = "{} of {} x {} patches is trained, and interpolated for {} x {}"
        said = line.format(name, *before, *after) in caplog.text
        assert said == (before != after)
    assert "decoder" not in caplog.text, "a classifier has none"


def test_as_many_patches_of_another_grid_are_no_fit(tmp_path: Path) -> None:
    """64 mel bins and 2,048 frames have the 512 patches of 128 and 1,024."""
    path, _ = saved(tmp_path)
    model = CAVMAE(replace(LONG, audio_frames=2048, mel_bins=64))
    load_initial_weights(model, path)
    assert torch.equal(model.pos_embed_a, position_table(32, (4, 128)))


@pytest.mark.field
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fixed_tables_stay_fixed_in_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tables = {name: tensor.to(dtype) for name, tensor in saved(tmp_path)[1].items()}
    path, _ = saved(tmp_path, **tables)
    model = CAVMAE(replace(LONG, audio_frames=512))
    load_initial_weights(model, path)
    assert torch.equal(model.pos_embed_a, position_table(32, (8, 32)))


@pytest.mark.field
def test_trained_tables_in_bf16_are_interpolated_in_float32(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, pos_embed_v=trained(32, (4, 4)).bfloat16())
    model = CAVMAE(replace(LONG, image_size=96))
    load_initial_weights(model, path)
    assert not torch.equal(model.pos_embed_v, model.pos_embed_v.bfloat16().float())


@pytest.mark.parametrize("mel_bins, frames, before", [(64, 512, (4, 128)), (80, 512, (8, 64))])
def test_a_table_that_tells_no_grid_is_taken_to_have_the_models_mel_bins_or_128(
    tmp_path: Path, caplog: Logs, mel_bins: int, frames: int, before: Grid
) -> None:
    path, _ = saved(tmp_path, pos_embed_a=torch.randn(1, 512, 32))
    caplog.set_level(logging.INFO)
    load_initial_weights(CAVMAE(replace(LONG, mel_bins=mel_bins, audio_frames=frames)), path)
    assert "pos_embed_a of {} x {} patches (assumed) is trained".format(*before) in caplog.text


@pytest.mark.parametrize(
    "name, positions, message",
    [
        ("pos_embed_a", 516, "make no grid of 5 or 8 rows; set model.mel_bins to the checkpoint's"),
        ("pos_embed_v", 20, "make no square; take one of square images"),
        ("pos_embed_a", 0, "make no grid"),
    ],
)
def test_a_table_that_fits_no_grid_is_an_error(
    tmp_path: Path, name: str, positions: int, message: str
) -> None:
    path, _ = saved(tmp_path, **{name: torch.randn(1, positions, 32)})
    with pytest.raises(ValueError, match=rf"w\.pth: {name} has {positions} trained.*{message}"):
        load_initial_weights(CAVMAE(replace(LONG, mel_bins=80)), path)


def test_grids_are_told_by_fixed_and_by_trained_tables() -> None:
    for grid in ((8, 64), (4, 128), (1, 64), (64, 8), (14, 14), (12, 101)):
        assert grid_of(position_table(32, grid)) == grid_of(trained(32, grid)) == grid
    assert grid_of(torch.zeros(1, 512, 32)) is None


def test_mel_bins_of_a_weights_file_are_told_by_its_positions() -> None:
    sizes = replace(LONG, mel_bins=64, width=64, heads=1)
    found = sizes_of(CAVMAE(sizes).state_dict(), "w.pth")
    assert (found.mel_bins, found.audio_frames) == (64, 1024)


def test_tables_are_left_alone_where_the_grid_is_the_models() -> None:
    model = CAVMAE(LONG)
    state = {"pos_embed_a": trained(32, (8, 64)), "pos_embed_v": torch.randn(1, 16, 32)}
    adapted = adapt_positions(state, model, "w.pth")
    assert all(adapted[name] is table for name, table in state.items())


def test_a_length_that_is_not_of_whole_patches_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"audio_frames is 300.*multiple of 16 such as 304"):
        replace(LONG, audio_frames=300)


def clips(sizes: ModelConfig) -> AudioVideoBatch:
    generator = torch.Generator().manual_seed(2)
    return AudioVideoBatch(
        log_mel=torch.randn(4, sizes.audio_frames, sizes.mel_bins, generator=generator),
        frames=torch.randn(4, 1, 3, sizes.image_size, sizes.image_size, generator=generator),
        positions=torch.arange(4),
        epochs=torch.zeros(4, dtype=torch.int64),
        sample_ids=tuple("abcd"),
        frame_seconds=torch.zeros(4, 1),
        audio_seconds=torch.zeros(4, 2),
        labels=(("dog",), ("rain",), ("dog",), ("rain",)),
        mixup_lambda=torch.ones(4),
        mixed_labels=((), (), (), ()),
    )


@pytest.mark.parametrize("kind", ["pretraining", "fine-tuning"])
@pytest.mark.parametrize("frames", [512, 304])
def test_a_shorter_model_trains_from_a_checkpoint_of_1024_frames(
    tmp_path: Path, kind: str, frames: int
) -> None:
    path, state = saved(tmp_path)
    run = {
        **{"model": replace(LONG, audio_frames=frames), "initial_weights": str(path)},
        **{"global_batch": 4, "micro_batch": 4, "lanes": 4},
    }
    ranks, device = Ranks(0, 1, 0, 1), torch.device("cpu")
    if kind == "pretraining":
        task = PretrainTask(PretrainConfig(**run), ranks, device)
    else:
        classifier = ClassifierConfig(loss="cross_entropy")
        labels = LabelSet(("dog", "rain"), ("Dog", "Rain"))
        task = FinetuneTask(FinetuneConfig(**run, classifier=classifier), labels, ranks, device)
    model, _ = task.build_model()
    name = "blocks_a.0.mlp.fc1.weight"
    assert torch.equal(model.get_parameter(name), state[name])
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batch, losses = clips(run["model"]), []
    for _ in range(4):
        task.begin_step(model, [batch])  # pyright: ignore[reportArgumentType]
        loss = task.loss(model, batch)  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = not torch.equal(model.pos_embed_a, position_table(32, (8, frames // 16)))
    assert moved == (kind == "fine-tuning"), "where positions are trained"
