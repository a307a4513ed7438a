"""What validation is worth to a run: not its end."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from cavmae.dataloaders.config import DataConfig
from cavmae.trainer import validator
from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tasks.task import Validation
from cavmae.trainer.tracking.run_logger import RunLogger
from cavmae.trainer.validator import Validator


def test_figures_that_do_not_fit_on_the_disk_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(*_: Any) -> None:
        raise OSError(28, "No space left on device", "figures/step-10.png")

    def validate(*_: Any) -> Validation:
        return cast(Validation, SimpleNamespace(metrics={"val_loss": 1.0}, draw=draw))

    class Loader:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __iter__(self) -> Any:
            return iter(())

        def close(self) -> None: ...

    monkeypatch.setattr(validator, "ValidationLoader", Loader)
    logger = cast(RunLogger, SimpleNamespace(log_scores=lambda *_: None))
    config = PretrainConfig(data=DataConfig(validation="shards"))
    one = Validator(config, Ranks(0, 1, 0, 1), torch.device("cpu"), validate, logger)
    one.score(torch.nn.Linear(1, 1), 10)
    assert one.scores == {"val_loss": 1.0}
    assert "figures of step 10 could not be written: [Errno 28] No space left" in caplog.text
