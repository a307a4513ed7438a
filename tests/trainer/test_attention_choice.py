"""A run on a GPU gets the fastest attention for its model once; without a GPU, times are given."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cavmae.benchmarks.fake_cuda.process import in_fake_cuda
from cavmae.benchmarks.fake_cuda.trace import traced
from cavmae.kernels import AttentionBackend
from cavmae.trainer import run_dir
from cavmae.trainer.attention_choice import (
    Shape,
    attention_shapes,
    fixed_attention,
    seconds_of_a_block,
)
from cavmae.trainer.checkpoint.format import MANIFEST, checkpoint_folder, checkpoint_name
from cavmae.trainer.checkpoint.store import Store
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.config.recipes import (
    audioset_20k_audio,
    audioset_base,
    efficient_base,
    vggsound,
)

GPU = torch.device("cuda", 0)
BF16 = dataclasses.replace(audioset_base(), engine=EngineConfig(dtype="bf16"))


def test_the_shapes_are_those_of_the_published_model() -> None:
    assert attention_shapes(BF16) == [
        Shape(11, 12, 64, [128]),
        Shape(11, 12, 64, [49]),
        Shape(1, 12, 64, [128, 49, 177]),
        Shape(8, 16, 32, [708]),
    ]
    efficient = attention_shapes(efficient_base())[-1]
    assert efficient == Shape(8, 16, 32, [177], queries=177)
    assert attention_shapes(vggsound())[-1].lengths == [512, 196, 708]
    assert [shape.lengths for shape in attention_shapes(audioset_20k_audio())] == [[512], [512]]


def test_the_fastest_over_all_blocks_is_taken_and_what_fails_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def measure(backend: AttentionBackend, shape: Shape, *_: object) -> float:
        if backend == "sdpa-cudnn":
            raise RuntimeError("no kernel for this GPU")
        decoder = shape.head_width == 32  # 8 blocks of 31
        return {"sdpa-flash": (1.0, 4.0), "sdpa-efficient": (2.0, 1.0)}[backend][decoder]

    with caplog.at_level("INFO"):
        assert fixed_attention(BF16, GPU, measure) == "sdpa-efficient"  # 54 s, not 55
    assert "sdpa-cudnn is left out: no kernel for this GPU" in caplog.text


@pytest.mark.parametrize(("dtype", "attention"), [("bf16", "sdpa-flash"), ("fp32", "sdpa")])
def test_a_deterministic_run_has_attention_that_is(dtype, attention: str) -> None:
    engine = EngineConfig(dtype=dtype)
    config = dataclasses.replace(BF16, engine=engine, deterministic=True)
    assert fixed_attention(config, GPU) == attention


def test_a_resume_keeps_the_attention_that_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[AttentionBackend] = ["sdpa-cudnn", "sdpa-flash"]
    monkeypatch.setattr(run_dir, "fixed_attention", lambda config, device: chosen.pop(0))
    monkeypatch.setattr(run_dir, "hardware", lambda device: {})  # of a GPU that is not here
    config = PretrainConfig(str(tmp_path / "run"), engine=EngineConfig(dtype="bf16"))
    store = Store(checkpoint_folder(config))
    for _ in range(2):
        opened = run_dir.open_run_dir(config, tmp_path / "run", store, GPU, 1, 0)
        assert opened.engine.attention == "sdpa-cudnn"
        store.put(f"{checkpoint_name(10)}/{MANIFEST}", b"{}")


def test_every_shape_is_timed_on_a_device_that_computes_nothing() -> None:
    seconds = in_fake_cuda(timed)
    assert len(seconds) == 15 and min(seconds) > 0


def timed() -> list[float]:
    backends: tuple[AttentionBackend, ...] = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
    with traced():
        return [
            seconds_of_a_block(backend, shape, torch.bfloat16, GPU)
            for backend in backends
            for shape in (*attention_shapes(BF16), Shape(8, 16, 32, [177], queries=531))
        ]
