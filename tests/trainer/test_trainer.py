"""What ends a training loop whose updates are not finite says why."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cavmae.trainer import trainer
from cavmae.trainer.config.configs import EngineConfig, PretrainConfig
from cavmae.trainer.trainer import NonFiniteError, Trainer


def stopped(weight: float, resumed_from: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return why a loop stops after two updates that were skipped, at step 12."""
    monkeypatch.setattr(trainer, "on_first_rank", lambda work: work())
    loop = Trainer.__new__(Trainer)  # nothing is built
    loop.config = PretrainConfig(
        initial_weights="mine.pt", engine=EngineConfig(max_skipped_updates=2)
    )
    weights = {"norm.bias": torch.zeros(2), "norm.weight": torch.tensor([1.0, weight])}
    vars(loop).update(
        run_dir=Path("run"),
        step=12,
        skipped_in_a_row=2,
        resumed_from=resumed_from,
        engine=SimpleNamespace(full_state_dict=lambda: weights),
    )
    with pytest.raises(NonFiniteError) as error:
        loop._check_skipped(float("nan"), ["a"])
    return str(error.value)


@pytest.mark.field
@pytest.mark.parametrize(
    ("resumed_from", "start"), [("", "mine.pt"), ("run/checkpoints/step-10",) * 2]
)
def test_weights_that_are_not_finite_are_the_reason(
    resumed_from: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = stopped(float("nan"), resumed_from, monkeypatch)
    assert "as the weights are not finite themselves: 1 tensors, the first norm.weight" in message
    assert f"after 10 steps; this attempt started from {start}: start from" in message


def test_finite_weights_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lower optimizer.learning_rate" in stopped(1.0, "", monkeypatch)
