"""The card of a model: what it is, how to use it and, for a run, its training data and scores.

Only facts from the files of the run are on it, and only what may be published: names of data sets
without their folders and the fields that shape the model; nothing of machines, stores and servers.
The licence is left to whoever publishes the weights, and the card says so.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from cavmae.atomic_write import read_json
from cavmae.trainer.release.model_spec import ModelSpec
from cavmae.trainer.tracking.tracker import flatten
from cavmae.trainer.trained_on import TrainedOn, set_name

if TYPE_CHECKING:  # those who load a model don't need it
    from cavmae.trainer.evaluation.trained_run import AnyRun

UNKNOWN_TRAINING = "## Training\n\nUnknown: these weights were saved without their run.\n"

_SNIPPET = """\
import cavmae

model = cavmae.load(".")  # this folder, or the name of its repository on the Hub
{use}
"""
_EMBED = """\
found = model.embed("clip.mp4")  # yours: a path or URL of a video, a sound or a picture
print(found.audio, found.video)  # (width,) each
print(model.similarity("clip.mp4", "clip.mp4"))  # cosine of the sound and the picture"""
_CLASSIFY = """\
found = model.classify("clip.mp4")  # yours: a path or URL of a video, a sound or a picture
print(found.top(5))  # names and probabilities"""
_TASKS = {
    "": "feature-extraction",
    "multimodal": "video-classification",
    "videoonly": "video-classification",
    "audioonly": "audio-classification",
}
_INPUTS = {
    "multimodal": "audio and a video frame of the same moment",
    "videoonly": "a video frame",
    "audioonly": "audio",
}
_LICENCE = """\
**Licence: not chosen.** Whoever publishes these weights sets `license` at the top of this file and
replaces this paragraph. The training clips, and weights that training started from, may have terms
that restrict the choice.
"""
_LIMITS = """\
## Limits

The model takes {seconds:g} s of audio ({frames} frames; shorter audio is padded, longer cut) and
one image of {side} x {side} pixels. What is not named above was not measured: its quality on other
kinds of clips is unknown, and it may have learned any bias of its training clips.
"""
_TRAINING_FIELDS = (
    "seed",
    "steps",
    "global_batch",
    "average_from_epoch",
    "data.mixture",
    "data.sampling",
    "data.frame_choice",
    "data.window_seconds",
    "data.augmentation.",
    "mask.",
    "loss.",
    "optimizer.",
    "schedule.",
    "classifier.mode",
    "classifier.loss",
    "classifier.label_smoothing",
    "classifier.head_lr_mult",
    "classifier.train_encoders",
    "engine.dtype",
    "engine.clip_grad_norm",
)
"""Fields of a run, or prefixes of their names, that shaped its model."""


def model_card(spec: ModelSpec, provenance: str = UNKNOWN_TRAINING) -> ModelCard:
    """Write the card of a model.

    Args:
        spec: of the model.
        provenance: Markdown sections on where the weights come from.
    """
    if not spec.mode:
        title = "CAV-MAE, pretrained"
        purpose = "Embeds audio and video frames in one space."
    else:
        title = f"CAV-MAE, fine-tuned to {spec.classes} classes"
        purpose = f"Returns logits of classes for {_INPUTS[spec.mode]}."
    data = ModelCardData(
        license="unknown",
        library_name="cavmae",
        pipeline_tag=_TASKS[spec.mode],
        tags=["audio", "audio-visual", "cav-mae", "self-supervised-learning", "video"],
    )
    snippet = _SNIPPET.format(use=_CLASSIFY if spec.classes else _EMBED)
    sizes, preprocessing = spec.model, spec.preprocessing
    limits = _LIMITS.format(
        seconds=sizes.audio_frames * preprocessing.hop_samples / preprocessing.audio_hz,
        frames=sizes.audio_frames,
        side=sizes.image_size,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"A contrastive audio-visual masked autoencoder ([Gong et al., ICLR 2023]"
        f"(https://arxiv.org/abs/2210.07839)), made by `cavmae`. {purpose}\n",
        _LICENCE,
        f"## Use\n\n```python\n{snippet}```\n",
        "Graphs (`.pt2`, `.onnx`) beside this file take `spectrogram` as `log_mel`, and `frame`.\n",
        "The values of `config.json`:\n",
        _table(("preprocessing", "value"), dataclasses.asdict(preprocessing).items()),
        _table(("model", "value"), dataclasses.asdict(sizes).items()),
        provenance,
        limits,
    ]
    return ModelCard("\n".join(parts))


def provenance_of_file(path: Path, sha256: str, training: TrainedOn) -> str:
    """Write the card's sections for weights without their run."""
    return (
        f"## Training\n\n{_clips(training)} Exported from the weights file `{path.name}` "
        f"(SHA-256 `{sha256}`).\n"
    )


def provenance_of_run(run: "AnyRun") -> str:
    """Write the card's sections for a run: clips, recipe, scores, evaluations, code."""
    return "\n".join([_training(run), _scores(run), _evaluations(run), _origin(run)])


def _training(run: "AnyRun") -> str:
    config = run.config
    initial = f"`{set_name(config.initial_weights)}`" if config.initial_weights else "random"
    fields = [
        (name, value)
        for name, value in flatten(dataclasses.asdict(config)).items()
        if name.startswith(_TRAINING_FIELDS)
    ]
    return (
        f"## Training\n\n{_clips(run.training)} Initial weights: {initial}.\n\n"
        f"{_table(('field', 'value'), fields)}"
    )


def _clips(training: TrainedOn) -> str:
    """Name the clips that were trained on, those of the initial weights too."""
    known = [
        f"`{one.name}` ({one.clips} clips, fingerprint of the shards `{one.fingerprint}`)"
        for one in training.sets
    ]
    unknown = [f"unknown of `{one}`" for one in training.unknown]
    return f"Clips: {'; '.join(known + unknown)}."


def _scores(run: "AnyRun") -> str:
    scores = _read(run.folder / "summary.json").get("scores")
    if not scores:
        return "## Validation\n\nNone: the run had no validation clips.\n"
    validation, clips = set_name(run.config.data.validation), run.config.validation.clips
    return (
        f"## Validation\n\nAt the end of the run, at most {clips} clips of `{validation}`.\n\n"
        f"{_score_table(scores)}"
    )


def _evaluations(run: "AnyRun") -> str:
    parts = []
    for path in sorted((run.folder / "evaluation").glob("*.json")):
        result = read_json(path)
        if result.get("weights_sha256") != run.weights_sha256:
            continue
        options = ", ".join(
            f"{name} {value}"
            for name, value in result.pop("options", {}).items()
            if isinstance(value, bool | int | float)
        )
        parts.append(
            f"### {path.stem}\n\nOn shards with the fingerprint `{result['shards_fingerprint']}`; "
            f"clips that were trained on: {result.get('leakage', 'unknown')}; {options}.\n"
        )
        parts.append(_score_table(result))
    return "\n".join(["## Evaluations\n", *(parts or ["None of these weights.\n"])])


def _origin(run: "AnyRun") -> str:
    record = _read(run.folder / "run.json")
    commits = ", ".join(f"`{one}`" for one in dict.fromkeys(record.get("git_commits", [])) if one)
    code = ", ".join(f"`{one}`" for one in dict.fromkeys(record.get("code", [])))
    return (
        f"## Origin\n\nWeights of the run: SHA-256 `{run.weights_sha256}`. "
        f"Commit of the code: {commits or 'unknown'}; hash of its files: {code or 'unknown'}.\n"
    )


def _score_table(values: dict[str, Any]) -> str:
    """Format all numbers of nested results, with their interval and chance where they have them."""
    numbers = {
        name: value
        for name, value in flatten(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    suffixes = ("_low", "_high", "_chance")
    rows = []
    for name, value in numbers.items():
        if name.endswith(suffixes):
            continue
        low, high, chance = (numbers.get(name + suffix) for suffix in suffixes)
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append((name, f"{value:.4g}", interval, "" if chance is None else f"{chance:.4g}"))
    return _table(("score", "value", "95% interval", "chance"), rows)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
