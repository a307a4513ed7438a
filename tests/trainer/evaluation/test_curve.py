"""A run's metrics over a published log: the right columns, in the run's units."""

import json
from pathlib import Path

import pytest
from tiny_run import tiny_finetuning, tiny_run

from cavmae import cli
from cavmae.trainer.config.configs import LossConfig
from cavmae.trainer.config.recipes import FINETUNE_RECIPES
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.evaluation.curve import curves
from cavmae.trainer.lr_schedule import learning_rate


def test_published_pretraining_losses_are_brought_to_the_units_of_a_run(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("epoch,Eval Audio MAE Loss,Eval Contrastive Loss\n1,2.4,0.08\n2,2.0,0.04\n")
    loss = LossConfig(contrastive_weight=0.01, scale=4.0)
    run = tiny_run(tmp_path, tmp_path / "run", loss=loss)
    records = [
        {"step": 3.0, "epoch": 1.0, "loss": 0.9},
        {
            **{"step": 3.0, "epoch": 1.0, "val_loss_reconstruction_audio": 0.7},
            "val_loss_contrastive": 2.1,
        },
    ]
    audio, contrastive = curves(run, records, log)
    assert audio.run == [(1.0, 0.7)] and contrastive.run == [(1.0, 2.1)]
    assert [value for _, value in audio.published] == pytest.approx([0.6, 0.5])
    assert [value for _, value in contrastive.published] == pytest.approx([2.0, 1.0])


def test_the_command_draws_what_a_fine_tuning_has_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save_config(tiny_finetuning(tmp_path, run_dir), run_dir / "config.json")
    record = {"step": 6, "epoch": 2.0, "unix_seconds": 0.0, "val_accuracy": 0.25}
    (run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    log = tmp_path / "published.csv"
    log.write_text("epoch,acc,AUC\n1,0.5,0.9\n2,0.625,0.95\n")
    assert cli.main(["curve", str(run_dir), str(log)]) == 0
    printed = capsys.readouterr().out
    assert "val_accuracy: 0.25 at epoch 2; published 0.625 at epoch 2" in printed
    assert (run_dir / "figures/curve-published.png").stat().st_size > 5000

    log.write_text("epoch,mAP\n1,0.5\n")
    assert cli.main(["curve", str(run_dir), str(log)]) == 1
    assert "no metric that the run" in capsys.readouterr().err


@pytest.mark.field
def test_a_log_of_the_published_code_gives_what_its_table_gives(tmp_path: Path) -> None:
    printed = (
        "+ python -W ignore run_cavmae_ft.py: mAP: 1\n"
        "Epoch: [1][100/519]\tTrain Loss 0.0287\t\nframe 4qh7oY9mN1w 9 does not exist\n"
        "mAP: {}\nAUC: {}\nvalidation finished\nEpoch-{} lr: 5e-05\nepoch {} training time: 495\n"
    )
    text = printed.format(0.25, 0.5, 1, 1) + printed.format(0.5, 0.75, 2, 2) + "mAP: 0.9\n"
    (tmp_path / "as20k.txt").write_text(text)
    (tmp_path / "as20k.csv").write_text("epoch;mAP;AUC\n1;0.25;0.5\n2;0.5;0.75\n")
    run = tiny_finetuning(tmp_path, tmp_path / "run")
    records = [{"step": 6.0, "epoch": 2.0, "val_mean_average_precision": 0.3, "val_mean_auc": 0.4}]
    of_text = curves(run, records, tmp_path / "as20k.txt")
    assert of_text == curves(run, records, tmp_path / "as20k.csv")
    assert [curve.published for curve in of_text] == [[(1, 0.25), (2, 0.5)], [(1, 0.5), (2, 0.75)]]


@pytest.mark.field
def test_a_log_with_a_value_that_is_no_number_is_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("epoch;mAP\n1;0,5\n")
    run = tiny_finetuning(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"bad\.csv, line 2: mAP is '0,5', which is not a number"):
        curves(run, [], tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("recipe", "log", "steps_per_epoch"),
    [
        ("audioset_20k", "audioset_as20k_ft_42.2.csv", 519),
        ("audioset_2m", "audioset_as2m_ft_51.1.csv", 36917),
        ("vggsound", "vggsound_vgg_ft__as+vgg__pr_65.9_log.csv", 3827),
    ],
)
def test_the_recipes_learn_at_the_published_rates(
    recipe: str, log: str, steps_per_epoch: int, golden_folder: Path
) -> None:
    """Of each epoch, as the log prints it after its last step: that of the next one."""
    path = golden_folder / "published_curves" / log
    if not path.exists():
        pytest.skip(f"there is no {path}")
    header, *lines = path.read_text().splitlines()
    place = header.split(",").index("lr_after_step")
    config = FINETUNE_RECIPES[recipe]()
    assert len(lines) == config.epochs
    for finished, line in enumerate(lines, start=1):
        rate = learning_rate(
            config.schedule,
            config.optimizer.learning_rate,
            step=finished * steps_per_epoch,
            steps=int(config.epochs) * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
        )
        assert rate == pytest.approx(float(line.split(",")[place])), f"after epoch {finished}"
