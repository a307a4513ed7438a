"""`cavmae evaluate probe`: what frozen features tell of labels, beside those of random weights."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import save_untrained

from cavmae import cli
from cavmae.trainer.evaluation.probe import (
    ProbeConfig,
    linear_probe,
    nearest_neighbours,
)


def clustered(clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of three classes far apart, and one-hot targets."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(clips) % 3
    centres = 5 * torch.eye(3, 8)
    features = centres[classes] + torch.randn(clips, 8, generator=generator)
    return features, torch.nn.functional.one_hot(classes, 3).float()


@pytest.mark.parametrize("classify", ["linear", "neighbours"])
def test_classes_that_lie_apart_are_told_apart(classify: str) -> None:
    train, targets = clustered(60, seed=0)
    test, truth = clustered(30, seed=1)
    if classify == "linear":
        guesses = linear_probe(train, targets, test, 1e-3)
    else:
        guesses = nearest_neighbours(train, targets, test, 5)
    assert (guesses.argmax(1) == truth.argmax(1)).all()


def test_the_linear_probe_is_at_its_optimum_whatever_the_order_of_clips() -> None:
    train, targets = clustered(60, seed=0)
    test, _ = clustered(30, seed=1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    found = linear_probe(train, targets, test, 0.1)
    torch.testing.assert_close(
        linear_probe(train[order], targets[order], test, 0.1), found, rtol=1e-3, atol=1e-3
    )
    assert linear_probe(train, targets, test, 10.0).abs().max() < 0.2 * found.abs().max()


def test_the_linear_probe_does_not_see_the_scale_of_a_feature() -> None:
    train, targets = clustered(60, seed=0)
    test, _ = clustered(30, seed=1)
    scale = torch.logspace(-3, 3, 8)
    found = linear_probe(train, targets, test, 0.1)
    torch.testing.assert_close(
        linear_probe(train * scale, targets, test * scale, 0.1), found, rtol=1e-3, atol=1e-3
    )


def test_votes_are_shares_and_the_nearest_weighs_most() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    votes = nearest_neighbours(train, targets, torch.tensor([[2.0, 0.0]]), 2)
    assert votes.sum() == pytest.approx(1.0)
    assert votes[0, 0] > votes[0, 1] > 0
    assert nearest_neighbours(train, targets, train, 100).shape == (3, 2), "at most all vote"


@pytest.mark.parametrize(("field", "least"), [("neighbours", 1), ("weight_decay", 0)])
def test_a_number_out_of_range_is_named(field: str, least: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1; use {least} or more"):
        ProbeConfig("run", "train", "test", **{field: -1})  # pyright: ignore[reportArgumentType]


def test_the_result_has_both_models_and_both_classifiers(
    packed_synthetic: Path, tmp_path: Path
) -> None:
    save_untrained(packed_synthetic, tmp_path / "run")
    shards, out = str(packed_synthetic / "frames"), tmp_path / "probe.json"
    words = ["evaluate", "probe", str(tmp_path / "run"), shards, shards, f"--out={out}"]
    assert cli.main(words) == 1, "it is asked for what it was trained on"
    assert cli.main([*words, "--allow-leakage"]) == 0
    result = json.loads(out.read_text())
    scores = result["scores"]
    for kind in ("linear", "neighbours"):
        # The run is one without a step: its weights are those that it would begin with.
        assert scores[f"pretrained, {kind}"] == scores[f"random weights, {kind}"]
    assert len(scores) == 4
    assert scores["pretrained, linear"]["accuracy"] == 1, "of the clips that it learned"
    assert scores["pretrained, neighbours"]["mean_auc"] == 1, "each is its own nearest"
    assert "d_prime" not in scores["pretrained, neighbours"], "infinite"
    assert len(result["classes"]) == 15 and result["leakage"] == "not checked"
