"""`cavmae export`: every format gives back the model, and tells what it was made of."""

import functools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from starts import Start
from tiny_models import (
    random_classifier,
    random_pretraining_model,
)
from tiny_run import MODEL, save_untrained, tiny_finetuning, tiny_run
from torch.export import ExportedProgram
from unsafe_pickle import save_malicious

import cavmae
from cavmae import cli
from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import IMAGE_MEAN, IMAGE_STD
from cavmae.trainer.config.configs import ClassifierConfig
from cavmae.trainer.config.serialize import save_config
from cavmae.trainer.evaluation.trained_run import open_trained_run
from cavmae.trainer.model.classifier import CAVMAEClassifier
from cavmae.trainer.model.weights import load_published
from cavmae.trainer.release import export
from cavmae.trainer.release.graphs import (
    PartOfModel,
    graph_of,
    max_abs_error,
    parts_of,
    random_inputs,
)
from cavmae.trainer.release.hub import HubCAVMAE, HubCAVMAEClassifier
from cavmae.trainer.tasks.labels import LabelSet

SIZES = [
    f"--model.{name.replace('_', '-')}={getattr(MODEL, name)}"
    for name in (
        "audio_frames",
        "mel_bins",
        "image_size",
        "width",
        "modality_depth",
        "heads",
        "decoder_width",
        "decoder_depth",
        "decoder_heads",
    )
]

# Runs in a process that can't find this package.
FOREIGN = """
import sys
import torch
inputs, out, *graphs = sys.argv[1:]
results = [
    [torch.export.load(graph).module()(**given) for given in torch.load(inputs)[number]]
    for number, graph in enumerate(graphs)
]
assert not [name for name in sys.modules if name.startswith("cavmae")]
torch.save(results, out)
"""


@pytest.fixture(scope="module")
def run_dir(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "run"
    save_untrained(packed_synthetic, folder)
    return folder


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a classifier of 5 classes, named as the published ones are."""
    path = tmp_path_factory.mktemp("weights") / "classifier.pth"
    torch.save(
        {f"module.{name}": tensor for name, tensor in random_classifier().state_dict().items()},
        path,
    )
    return path


@pytest.fixture(scope="module")
def run_out(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, in every format."""
    out = tmp_path_factory.mktemp("run_out") / "out"
    formats = ["--format", "hub", "torch", "onnx", "published"]
    assert cli.main(["export", str(run_dir), str(out), *formats]) == 0
    return out


def trained_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "weights.pt", weights_only=True)


def test_the_hub_folder_holds_the_weights_of_the_run(run_dir: Path, run_out: Path) -> None:
    expected = trained_state(run_dir)
    found = load_file(run_out / "model.safetensors")
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]
    assert HubCAVMAE.from_pretrained(run_out).spec.model == MODEL


@pytest.fixture(scope="module")
def cross_run(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross") / "run"
    sizes = replace(MODEL, decoder="cross", decoded_share=0.5)
    save_untrained(packed_synthetic, folder, model=sizes)
    return folder


def test_a_cross_attention_decoder_is_exported_and_reconstructs_as_its_run_does(
    cross_run: Path, packed_synthetic: Path, tmp_path: Path
) -> None:
    assert cli.main(["export", str(cross_run), str(tmp_path / "out")]) == 0
    assert "| decoder | cross |" in (tmp_path / "out/README.md").read_text()
    clip = packed_synthetic.parent / "videos" / "000009.mp4"
    sizes = replace(MODEL, decoder="cross")
    loaded = (
        cavmae.load(cross_run),
        cavmae.load(tmp_path / "out"),
        cavmae.load(cross_run / "weights.pt", sizes=sizes),
    )
    made = [one.reconstruct(str(clip)) for one in loaded]
    tokens, removed = MODEL.audio_tokens, made[0].audio_mask.removed.shape[1]
    assert made[0].predicted_audio.shape == (1, tokens, 256) and removed == tokens * 3 // 4
    for one in made[1:]:
        assert torch.equal(one.predicted_audio, made[0].predicted_audio)
        assert torch.equal(one.predicted_video, made[0].predicted_video)


def test_the_published_code_has_no_cross_attention_decoder(
    cross_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(cross_run), str(tmp_path / "out"), "--format", "published"]
    assert cli.main(words) == 1
    assert "model.decoder is cross, which the published code has not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_configuration_says_how_the_input_is_made(run_out: Path) -> None:
    made = HubCAVMAE.from_pretrained(run_out).spec.preprocessing
    assert (made.log_mel_mean, made.log_mel_std) == (
        DataConfig.log_mel_mean,
        DataConfig.log_mel_std,
    )
    assert (made.image_mean, made.image_std) == (IMAGE_MEAN, IMAGE_STD)
    assert (made.audio_hz, made.window_samples, made.hop_samples) == (16000, 400, 160)


def test_the_published_file_has_the_prefix_and_is_exported_again_alike(
    run_dir: Path, run_out: Path, tmp_path: Path
) -> None:
    state = torch.load(run_out / "published.pth", weights_only=True)
    expected = trained_state(run_dir)
    assert list(state) == [f"module.{name}" for name in expected]
    file = str(run_out / "published.pth")
    assert cli.main(["export", file, str(tmp_path / "out"), *SIZES]) == 0
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in expected if not torch.equal(again[name], expected[name])]
    assert "from the weights file `published.pth`" in (tmp_path / "out/README.md").read_text()


def test_graphs_give_the_embeddings_without_this_package(
    run_dir: Path, run_out: Path, tmp_path: Path
) -> None:
    model = random_pretraining_model()
    load_published(model, trained_state(run_dir))
    inputs = [
        [random_inputs(model, part, batch) for batch in (1, 3, 5)] for part in parts_of(model)
    ]
    torch.save(inputs, tmp_path / "inputs.pt")
    graphs = [str(run_out / f"{part}.pt2") for part in parts_of(model)]
    words = [str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt"), *graphs]
    result = subprocess.run(
        [sys.executable, "-I", "-c", FOREIGN, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for part, given, found in zip(
        parts_of(model), inputs, torch.load(tmp_path / "results.pt"), strict=True
    ):
        for one, output in zip(given, found, strict=True):
            expected = PartOfModel(model, part)(**one)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_onnx_gives_the_embeddings_of_any_batch(run_dir: Path, run_out: Path) -> None:
    import onnxruntime

    model = random_pretraining_model()
    load_published(model, trained_state(run_dir))
    for part in parts_of(model):
        session = onnxruntime.InferenceSession(run_out / f"{part}.onnx")
        for batch in (1, 4):
            inputs = random_inputs(model, part, batch)
            (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
            expected = PartOfModel(model, part)(**inputs)
            torch.testing.assert_close(torch.from_numpy(output), expected, atol=1e-5, rtol=0)


@functools.cache
def classifier_and_graph(part: export.Part) -> tuple[CAVMAEClassifier, ExportedProgram]:
    model = random_classifier()
    return model, graph_of(model, part)


@pytest.mark.parametrize("part", parts_of(random_classifier()))
def test_a_graph_of_each_part_of_a_classifier_is_exact(part: export.Part) -> None:
    model, graph = classifier_and_graph(part)
    module = graph.module()
    assert max_abs_error(model, part, lambda inputs: module(**inputs)) <= 1e-5


def test_a_graph_holds_only_the_parameters_it_uses() -> None:
    model, graph = classifier_and_graph("audioonly")
    names = {name.split(".")[1] for name in graph.state_dict}
    assert "blocks_a" in names and "mlp_head" in names
    assert not names & {"blocks_v", "patch_embed_v", "norm_v", "norm"}
    assert "blocks_v.0.attn.qkv.weight" in model.state_dict(), "the model keeps them"


def test_a_classifier_is_exported_with_its_logits(classifier_file: Path, tmp_path: Path) -> None:
    words = ["export", str(classifier_file), str(tmp_path / "out"), "--format", "onnx"]
    assert cli.main([*words, *SIZES]) == 0
    assert (tmp_path / "out" / "multimodal.onnx").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["classes"] == 5
    assert "5 classes" in ModelCard.load(tmp_path / "out/README.md").text


@pytest.fixture
def fine_tuned(packed_synthetic: Path, tmp_path: Path) -> Path:
    """A fine-tuning run of sound alone, as it leaves its folder, with random weights."""
    folder = tmp_path / "fine_tuned"
    folder.mkdir()
    classifier = ClassifierConfig(mode="audioonly")
    config = tiny_finetuning(packed_synthetic, folder, classifier=classifier)
    save_config(config, folder / "config.json")
    labels = LabelSet(("/m/1", "/m/2", "/m/3"), ("Dog", "Bell", "Rain"))
    (folder / "labels.csv").write_text(labels.as_csv())
    torch.manual_seed(0)
    torch.save(CAVMAEClassifier(MODEL, 3).state_dict(), folder / "weights.pt")
    return folder


def test_a_fine_tuning_run_is_exported_in_its_mode_with_its_classes(
    fine_tuned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli.main(["export", str(fine_tuned), str(out), "--format", "hub", "torch"]) == 0
    assert [path.name for path in out.glob("*.pt2")] == ["audioonly.pt2"]
    spec = HubCAVMAEClassifier.from_pretrained(out).spec
    assert (spec.mode, spec.classes) == ("audioonly", 3)
    assert spec.labels == ("Dog", "Bell", "Rain")
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "audio-classification"
    assert "| classifier.mode | audioonly |" in card.text


def test_a_fine_tuning_run_is_no_pretraining_run(fine_tuned: Path) -> None:
    with pytest.raises(ValueError, match="a fine-tuning run; give the folder of a pretraining run"):
        open_trained_run(fine_tuned)


def test_an_error_is_seen_and_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_classifier()
    whole = PartOfModel(model, "audio")
    found = max_abs_error(model, "audio", lambda inputs: whole(**inputs) + 2e-4)
    assert found == pytest.approx(2e-4, rel=0.01)
    batches = iter([1.0, float("nan")])
    broken = max_abs_error(model, "audio", lambda inputs: whole(**inputs) * next(batches))
    assert math.isnan(broken)
    monkeypatch.setattr(export, "MAX_ABS_ERROR", -1.0)
    with pytest.raises(ValueError, match=r"audio\.pt2 differs from the model by"):
        export.export(export.ExportConfig(str(run_dir), str(tmp_path / "out"), ("torch",)))
    assert not (tmp_path / "out/audio.pt2").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--what", "multimodal", "--format", "torch"],
            "what is multimodal, which this model lacks",
        ),
        (["--what", "audio"], "format hub has no parts; add torch or onnx"),
        (["--model.width=96"], "model is set and .* is a run"),
        (["--log-mel-mean=-4"], "log_mel_mean is set and .* is a run"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    run_dir: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["export", str(run_dir), str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert re.match(f"error: .*{message}", error)
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sizes_that_are_not_the_files_are_one_line(
    classifier_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [size for size in SIZES if "depth" not in size]
    assert cli.main(["export", str(classifier_file), str(tmp_path / "out"), *words]) == 1
    assert "Set model.modality_depth and model.joint_depth" in capsys.readouterr().err


def test_a_file_that_would_run_code_is_refused_unrun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = save_malicious(tmp_path / "weights.pt", tmp_path)
    assert cli.main(["export", str(tmp_path / "weights.pt"), str(tmp_path / "out"), *SIZES]) == 1
    assert "could run code" in capsys.readouterr().err
    assert not marker.exists()


def test_a_missing_package_is_named_before_anything_is_done(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = ["export", str(run_dir), str(tmp_path / "out"), "--format", "onnx"]
    assert cli.main(words) == 1
    assert capsys.readouterr().err == (
        "error: ONNX needs onnxscript, which is not installed; pip install 'cavmae[export]'\n"
    )


def test_the_card_names_no_folder_of_the_machine(run_dir: Path, run_out: Path) -> None:
    card = (run_out / "README.md").read_text()
    assert str(run_dir.parent) not in card and "/tmp" not in card
    assert "`shards/frames` (24 clips, fingerprint of the shards `" in card


@pytest.mark.slow
def test_the_card_tells_what_a_run_was_trained_on_and_how_it_scored(
    packed_synthetic: Path, val_shards: Path, tmp_path: Path
) -> None:
    data = DataConfig(
        train=str(packed_synthetic / "frames"),
        validation=str(val_shards / "frames"),
        reader_workers=1,
        decode_threads=1,
    )
    run_dir, out = tmp_path / "run", tmp_path / "out"
    Start(tiny_run(packed_synthetic, run_dir, steps=4, data=data), 1, tmp_path).finish()
    shards = str(val_shards / "frames")
    assert cli.main(["evaluate", "retrieve", str(run_dir), shards, "--per-class=0"]) == 0
    (evaluation,) = (run_dir / "evaluation").iterdir()
    of_other_weights = json.loads(evaluation.read_text()) | {"weights_sha256": "0" * 64}
    (run_dir / "evaluation" / "of-other-weights.json").write_text(json.dumps(of_other_weights))
    assert cli.main(["export", str(run_dir), str(out)]) == 0

    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["license"] == "unknown"
    assert "**Licence: not chosen.**" in card.text
    summary = json.loads((run_dir / "summary.json").read_text())
    for name in ("val_loss", "val_audio_to_video_r1"):
        assert f"| {name} | {summary['scores'][name]:.4g} |" in card.text
    result = json.loads(evaluation.read_text())
    assert f"### {evaluation.stem}" in card.text
    assert f"| audio_to_video.r1 | {result['audio_to_video']['r1']:.4g} |" in card.text
    assert "of-other-weights" not in card.text
    run = json.loads((run_dir / "run.json").read_text())
    for one in (result["weights_sha256"], result["shards_fingerprint"], run["code"][0]):
        assert f"`{one}`" in card.text
    assert "| steps | 4 |" in card.text
