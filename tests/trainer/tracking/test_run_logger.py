"""A logger writes on rank 0 alone; what the others pass to it goes nowhere."""

from pathlib import Path

import pytest
import torch

from cavmae.trainer.config.configs import PretrainConfig
from cavmae.trainer.distributed.env import Ranks
from cavmae.trainer.tracking.run_logger import RunLogger

METRICS = {"loss": 1.0, "samples_per_second": 2.0, "data_wait_share": 0.5}


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = RunLogger(
        PretrainConfig(run_dir=str(tmp_path)),
        tmp_path,
        Ranks(1, 2, 1, 2),
        start_step=0,
        steps_per_epoch=10.0,
        device=torch.device("cpu"),
    )
    logger.log_step(1, METRICS)
    logger.log_scores({"val_loss": 1.0}, 1)
    logger.log_figure(tmp_path / "figure.png")
    logger.close("FINISHED")
    assert not logger.tracking_uri and not logger.mlflow_run
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
