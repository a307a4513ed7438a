"""A step's time goes to the part of the model that spends it, forward and backward."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run_ranks
from tiny_run import MODEL

from cavmae.benchmarks.harness import timeline
from cavmae.benchmarks.harness.timeline import Label, Timeline
from cavmae.benchmarks.step import parts
from cavmae.benchmarks.step.parts import FUNCTIONS, GRADIENTS, MODULES, PARTS, PartObserver
from cavmae.kernels import contrastive_loss
from cavmae.trainer.model.blocks import Block
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.config import MaskConfig
from cavmae.trainer.tasks import pretrain

FORWARD_SECONDS, BACKWARD_SECONDS = 1.0, 10.0
LATE_SECONDS = 0.2
COLLECTIVE_RANKS = Path(__file__).with_name("collective_ranks.py")


class Slow(torch.autograd.Function):
    """Does nothing, which takes a while each way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, wait: Callable[[float], None]) -> torch.Tensor:
        ctx.wait = wait
        wait(FORWARD_SECONDS)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.wait(BACKWARD_SECONDS)
        return gradients[0], None


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The only thing that takes time; what an observer replaces is put back afterwards."""
    now = 0.0

    def pass_seconds(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(timeline.time, "perf_counter", lambda: now)
    for caller, function, _ in FUNCTIONS:
        monkeypatch.setattr(caller, function.__name__, function)
    return pass_seconds


def new_model() -> CAVMAE:
    model = CAVMAE(MODEL)
    model.freeze_unused(reconstruct=True, contrast=True)
    return model


def timed_step(model: CAVMAE, observer: PartObserver, line: Timeline) -> dict[Label, float]:
    """Seconds by label of a step of the model, without those that took none."""
    line.begin_step(Label("loop"))
    masks = pretrain.masks_of(("audio", "video"), MODEL, MaskConfig(), torch.arange(2), seed=0)
    output = model(torch.randn(2, 192, 32), torch.randn(2, 3, 32, 32), *masks)
    assert output.audio_embedding is not None and output.video_embedding is not None
    assert output.reconstruction_audio is not None and output.reconstruction_video is not None
    contrast = contrastive_loss(output.audio_embedding, output.video_embedding, 0.05, False).loss
    loss = output.reconstruction_audio + output.reconstruction_video + contrast
    with observer.backward(loss):
        loss.backward()
    line.begin_step(Label("loop"))
    (seconds,) = line.seconds()
    return {label: value for label, value in seconds.items() if value}


@pytest.mark.parametrize(
    "name",
    ["patch_embed_a", "blocks_a.0", "blocks_v.0", "blocks_u.0", "norm_v", "norm", "decoder_embed",
     "decoder_blocks.0", "decoder_pred_v"],
)  # fmt: skip
def test_a_module_has_its_time_both_ways(name: str, wait: Callable[[float], None]) -> None:
    model = new_model()
    model.get_submodule(name).register_forward_hook(
        lambda _module, _inputs, output: Slow.apply(output, wait)
    )
    line = Timeline(torch.device("cpu"), Label("loop"))
    part = MODULES[name.partition(".")[0]]
    assert timed_step(model, PartObserver(model, line), line) == {
        Label(part, "forward"): FORWARD_SECONDS,
        Label(part, "backward"): BACKWARD_SECONDS,
    }


def test_a_function_has_its_time_both_ways(
    monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None]
) -> None:
    from cavmae.trainer.model import cavmae

    inner = cavmae.masked_reconstruction_loss
    monkeypatch.setattr(
        cavmae,
        "masked_reconstruction_loss",
        lambda *arguments: Slow.apply(inner(*arguments), wait),
    )
    model, line = new_model(), Timeline(torch.device("cpu"), Label("loop"))
    assert timed_step(model, PartObserver(model, line), line) == {
        Label("losses", "forward"): 2 * FORWARD_SECONDS,  # of audio and of video
        Label("losses", "backward"): 2 * BACKWARD_SECONDS,
    }


def test_gradients_are_a_part_of_their_own(wait: Callable[[float], None]) -> None:
    model, line = new_model(), Timeline(torch.device("cpu"), Label("loop"))
    model.decoder_norm.weight.register_post_accumulate_grad_hook(lambda _parameter: wait(3.0))
    assert timed_step(model, PartObserver(model, line), line) == {GRADIENTS: 3.0}


def test_what_is_computed_again_counts_to_the_backward_pass(wait: Callable[[float], None]) -> None:
    model, line = new_model(), Timeline(torch.device("cpu"), Label("loop"))
    (block,) = model.decoder_blocks
    assert isinstance(block, Block)
    block.set_recomputed("full")
    block.attn.register_forward_hook(lambda _module, _inputs, output: Slow.apply(output, wait))
    assert timed_step(model, PartObserver(model, line), line) == {
        Label("decoder", "forward"): FORWARD_SECONDS,
        Label("decoder", "backward"): FORWARD_SECONDS + BACKWARD_SECONDS,
    }


def test_compiled_blocks_are_seen_as_well(
    monkeypatch: pytest.MonkeyPatch, wait: Callable[[float], None]
) -> None:
    model = new_model()
    for block in model.decoder_blocks:
        block.compile(backend="aot_eager")
    model(
        torch.randn(2, 192, 32),
        torch.randn(2, 3, 32, 32),
        *pretrain.masks_of(("audio", "video"), MODEL, MaskConfig(), torch.arange(2), seed=0),
    )
    # What a block does is inside its graph, so here each look at the clock takes a second, and
    # nothing else of the decoder is observed.
    ticks = itertools.count()
    monkeypatch.setattr(timeline.time, "perf_counter", lambda: float(next(ticks)))
    others = tuple(one for one in FUNCTIONS if one[2] != "decoder")
    monkeypatch.setattr(parts, "FUNCTIONS", others)
    line = Timeline(torch.device("cpu"), Label("loop"))
    observer = PartObserver(model, line)
    for name in ("decoder_embed", "decoder_norm", "decoder_pred_a", "decoder_pred_v"):
        model.get_submodule(name)._compiled_call_impl = None
    seconds = timed_step(model, observer, line)
    assert seconds[Label("decoder", "forward")] == MODEL.decoder_depth
    assert seconds[Label("decoder", "backward")] >= MODEL.decoder_depth


def test_a_module_that_has_no_part_is_an_error(wait: Callable[[float], None]) -> None:
    model = new_model()
    model.add_module("second_decoder", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="knows no module second_decoder of the model; name its"):
        PartObserver(model, Timeline(torch.device("cpu"), Label("loop")))


def test_a_function_has_the_name_that_its_caller_calls_it_by() -> None:
    assert all(getattr(caller, one.__name__) is one for caller, one, _ in FUNCTIONS)


def test_a_part_that_nothing_calls_is_an_error(wait: Callable[[float], None]) -> None:
    model, line = new_model(), Timeline(torch.device("cpu"), Label("loop"))
    observer = PartObserver(model, line)
    with pytest.raises(ValueError, match=f"that parts.py names for {PARTS[0]}"):
        observer.check()
    timed_step(model, observer, line)
    observer.check()


@pytest.mark.slow
def test_in_every_stage_all_waiting_for_other_ranks_is_communication(tmp_path: Path) -> None:
    stages = run_ranks(COLLECTIVE_RANKS, 2, [LATE_SECONDS], tmp_path)
    assert len(stages) == 4
    for stage, steps in enumerate(stages):
        # The least of some steps: the cores have other work as well.
        work = min(seconds for seconds, _ in steps)
        assert work < LATE_SECONDS / 2, f"stage {stage} has a collective that is not seen: {steps}"
        assert all(communication > 5 * LATE_SECONDS for _, communication in steps), steps
