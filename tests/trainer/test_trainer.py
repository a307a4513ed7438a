"""What ends a training loop whose updates are not finite says why; ranks exchange only news."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cavmae.dataloaders.loading.quarantine import QuarantinedSample
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


def test_ranks_exchange_the_clips_that_are_new_since_the_checkpoint_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[set[tuple[str, str]]] = []

    def on_two_ranks(work: Callable[[], set[tuple[str, str]]]) -> list[set[tuple[str, str]]]:
        sent.append(work())
        return [sent[-1], {("b", "of the other rank")} if len(sent) == 1 else set()]

    monkeypatch.setattr(trainer, "on_all_ranks", on_two_ranks)
    known, first, second = (QuarantinedSample(name, "reason") for name in ("known", "c", "a"))
    found = [known, first]
    loop = Trainer.__new__(Trainer)  # nothing is built
    vars(loop).update(
        config=PretrainConfig(),
        ranks=SimpleNamespace(world_size=2),
        fingerprint="",
        quarantined={("known", "reason")},
        loader=SimpleNamespace(quarantine=found),
    )
    whole = [("b", "of the other rank"), ("c", "reason"), ("known", "reason")]
    assert list(loop._state_at(10).quarantine) == whole
    found.append(second)
    assert list(loop._state_at(20).quarantine) == [("a", "reason"), *whole]
    assert sent == [{("c", "reason")}, {("a", "reason")}]
