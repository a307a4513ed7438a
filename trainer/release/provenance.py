"""What the files of a run say of its weights, as sections of a model card.

Only what may be published: names of sets without the folders they lie in, and the fields that say
how the model was made; nothing of machines, stores and servers.
"""

import dataclasses
from pathlib import Path
from typing import Any

from cavmae.dataloaders.shards.shard_set import ShardSet
from cavmae.trainer.config.serialize import read_json
from cavmae.trainer.evaluation.trained_run import AnyRun
from cavmae.trainer.release.model_card import table
from cavmae.trainer.tracking.tracker import flatten

_FIELDS = (
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
"""Fields of a run, or the beginnings of their names, that tell how its model was made."""


def provenance_of_file(path: Path, sha256: str) -> str:
    """Of weights without their run."""
    return (
        f"## Training\n\nNot told: exported from the weights file `{path.name}` "
        f"(SHA-256 `{sha256}`).\n"
    )


def provenance_of_run(run: AnyRun) -> str:
    """Of a run: clips, recipe, held-out scores, evaluations, code."""
    return "\n".join([_training(run), _scores(run), _evaluations(run), _origin(run)])


def _training(run: AnyRun) -> str:
    config, folders = run.config, run.config.data.train_folders
    names = ", ".join(f"`{_last_parts(folder)}`" for folder in folders)
    try:
        shards = ShardSet(folders, config.data.cache)
        clips = f"{shards.samples} clips, fingerprint of the shards `{shards.fingerprint}`"
    except (OSError, ValueError):
        clips = "the shards could not be read when this card was made, so they are not counted here"
    start = f"`{_last_parts(config.initial_weights)}`" if config.initial_weights else "random"
    fields = [
        (name, value)
        for name, value in flatten(dataclasses.asdict(config)).items()
        if name.startswith(_FIELDS)
    ]
    return (
        f"## Training\n\nClips: {names} ({clips}). Initial weights: {start}.\n\n"
        f"{table(('field', 'value'), fields)}"
    )


def _scores(run: AnyRun) -> str:
    scores = _read(run.folder / "summary.json").get("scores")
    if not scores:
        return "## Held-out scores\n\nNone: the run had no held-out clips.\n"
    held_out, clips = _last_parts(run.config.data.validation), run.config.validation.clips
    return (
        f"## Held-out scores\n\nAt the end of the run, at most {clips} clips of `{held_out}`.\n\n"
        f"{_numbers(scores)}"
    )


def _evaluations(run: AnyRun) -> str:
    found = [(path, read_json(path)) for path in sorted((run.folder / "evaluation").glob("*.json"))]
    of_these = [
        (path, result)
        for path, result in found
        if result.get("weights_sha256") == run.weights_sha256
    ]
    if not of_these:
        return "## Evaluations\n\nNone of these weights.\n"
    parts = ["## Evaluations\n"]
    for path, result in of_these:
        asked = ", ".join(
            f"{name} {value}"
            for name, value in result.pop("options", {}).items()
            if isinstance(value, bool | int | float)
        )
        parts.append(
            f"### {path.stem}\n\nOn shards with the fingerprint `{result['shards_fingerprint']}`; "
            f"clips that were trained on: {result.get('leakage', 'not noted')}; {asked}.\n"
        )
        parts.append(_numbers(result))
    return "\n".join(parts)


def _origin(run: AnyRun) -> str:
    record = _read(run.folder / "run.json")
    commits = ", ".join(f"`{one}`" for one in dict.fromkeys(record.get("git_commits", [])) if one)
    code = ", ".join(f"`{one}`" for one in dict.fromkeys(record.get("code", [])))
    return (
        f"## Origin\n\nWeights of the run: SHA-256 `{run.weights_sha256}`. "
        f"Commit of the code: {commits or 'not noted'}; hash of its files: {code or 'not noted'}.\n"
    )


def _numbers(values: dict[str, Any]) -> str:
    """Every number of nested results, with its interval and chance where they have them."""
    numbers = {
        name: value
        for name, value in flatten(values).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    beside = ("_low", "_high", "_chance")
    rows = []
    for name, value in numbers.items():
        if name.endswith(beside):
            continue
        low, high, chance = (numbers.get(name + end) for end in beside)
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append((name, f"{value:.4g}", interval, "" if chance is None else f"{chance:.4g}"))
    return table(("score", "value", "95% interval", "chance"), rows)


def _last_parts(place: str) -> str:
    """The last two parts of a path or a URL: they name a set, the others a machine."""
    return "/".join(Path(place).parts[-2:])


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
