"""Initial weights: published CAV-MAE checkpoints and ImageNet MAE ones, and for fine-tuning those
of a pretraining run.

Files are read with `weights_only=True`, so that a checkpoint cannot run code. A key that does not
fit is an error, never a silently random layer.
"""

import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import VIDEO_ONLY, CAVMAEClassifier

State = Mapping[str, torch.Tensor]

_LISTED = 8
PRETRAINING_FIX = (
    "Set model.modality_depth, model.joint_depth and model.decoder_depth to the checkpoint's, or "
    "take a checkpoint with its decoder and without a classifier"
)
CLASSIFIER_FIX = (
    "Set model.modality_depth and model.joint_depth to the checkpoint's; an audio-only checkpoint "
    "fits a classifier built with video=False"
)


def load_initial_weights(model: CAVMAE, path: str | Path) -> None:
    """Load a checkpoint of either kind into `model`, in place.

    Args:
        path: a published CAV-MAE state dict (with or without `module.` prefixes), our own
            `weights.pt`, or an ImageNet MAE checkpoint with its decoder.

    Raises:
        ValueError: a file that is neither, or whose tensors do not fit the model.
        FileNotFoundError: no such file.
    """
    state = read_state(path)
    if "patch_embed_a.proj.weight" in state:
        load_published(model, state)
    elif "patch_embed.proj.weight" in state:
        model.load_state_dict(adapt_mae(state, model))
    else:
        raise ValueError(
            f"{path} holds neither CAV-MAE weights (patch_embed_a.proj.weight) nor ImageNet MAE "
            f"weights (patch_embed.proj.weight); its first keys are {sorted(state)[:_LISTED]}"
        )


def load_published(model: CAVMAE, path_or_state: str | Path | State) -> None:
    """Load a published CAV-MAE pretraining checkpoint into `model`, in place.

    Position tables are loaded as they are: the published ones are the fixed sine-cosine tables.

    Args:
        path_or_state: file, or state dict with or without `module.` prefixes.

    Raises:
        ValueError: a missing, unexpected or wrongly shaped tensor, with its shapes.
        FileNotFoundError: no such file.
    """
    state, _ = _read(path_or_state)
    expected = model.state_dict()
    _check_keys(state, expected, PRETRAINING_FIX)
    _check_shapes({name: (name, state[name]) for name in state}, expected)
    model.load_state_dict(dict(state))


def load_classifier_weights(
    model: CAVMAEClassifier, path_or_state: str | Path | State
) -> list[str]:
    """Load a pretraining or a fine-tuned CAV-MAE checkpoint into `model`, in place.

    The decoder of a pretraining checkpoint is skipped, and for an audio-only `model` everything
    that only video uses. All other tensors must fit.

    Args:
        path_or_state: file or state dict, ours (`weights.pt`) or published, with or without
            `module.` prefixes.

    Returns:
        The parameters that the checkpoint does not have and that keep their values: those of the
        head for a pretraining checkpoint, none for a fine-tuned one.

    Raises:
        ValueError: a checkpoint of another architecture, another number of classes, or a missing,
            unexpected or wrongly shaped tensor, with its shapes.
        FileNotFoundError: no such file.
    """
    state, source = _read(path_or_state)
    if "patch_embed_a.proj.weight" not in state:
        raise ValueError(
            f"{source} holds no CAV-MAE weights (patch_embed_a.proj.weight); its first keys are "
            f"{sorted(state)[:_LISTED]}. Fine-tuning starts from a CAV-MAE checkpoint: pretrain "
            "from this one first, or take the weights.pt of a pretraining run"
        )
    skipped = ["mask_token"] + ([] if model.has_video else [*VIDEO_ONLY])
    state = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith("decoder_") and name.split(".")[0] not in skipped
    }
    expected = model.state_dict()
    head = [name for name in expected if name.startswith("mlp_head.")]
    kept = [] if any(name in state for name in head) else head
    _check_classes(source, state, model.classes)
    _check_keys(state, [name for name in expected if name not in kept], CLASSIFIER_FIX)
    _check_shapes({name: (name, state[name]) for name in state}, expected)
    model.load_state_dict(expected | state)
    return kept


def adapt_mae(source_state: State, model: CAVMAE) -> dict[str, torch.Tensor]:
    """Convert weights of an ImageNet MAE (He et al. 2022) for both modalities, as published.

    Both modality encoders start from the first blocks and the joint encoder from the last ones;
    the audio patch projection is the sum over the image channels. Parameters without a counterpart
    in MAE keep their value in `model`: modality vectors, audio positions, the norms of single
    streams.

    Args:
        source_state: checkpoint with the MAE decoder, with or without `module.` prefixes.
        model: gives sizes and the values that are kept; it is not changed.

    Returns:
        A whole state dict for `model`.

    Raises:
        ValueError: a missing, unused or wrongly shaped tensor, with its shapes.
    """
    source = _without_prefix(source_state)
    state = dict(model.state_dict())
    sources = {name: key for name in state if (key := _mae_key(name, model)) is not None}
    expected = [*dict.fromkeys(sources.values()), "cls_token"]
    _check_keys(source, expected, PRETRAINING_FIX, optional="cls_token")
    adapted = {name: _adapt(name, source[key]) for name, key in sources.items()}
    _check_shapes({name: (sources[name], tensor) for name, tensor in adapted.items()}, state)
    return state | adapted


def published_state(model: CAVMAE | CAVMAEClassifier) -> dict[str, torch.Tensor]:
    """Return a state dict with the names of the published files, which the published code loads."""
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file by name, without `module.` prefixes.

    Raises:
        ValueError: a file that holds more than tensors and plain containers, or no tensors.
        FileNotFoundError: no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors, or holds Python objects that could run code when "
            "read; save the bare state dict (torch.save(model.state_dict(), ...)) where you trust "
            "the file"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, struct.error) as error:
        # A file that is no zip is read as a pickle stream, which fails in many ways.
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {error}; copy or download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # MAE checkpoints keep the weights beside other things
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    other = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise ValueError(
            f"{path} holds values that are no tensors, such as {', '.join(other[:_LISTED])}; "
            "save the bare state dict"
        )
    return _without_prefix(content)


def _read(path_or_state: str | Path | State) -> tuple[dict[str, torch.Tensor], str]:
    """Return tensors without `module.` prefixes, and their source for messages."""
    if isinstance(path_or_state, str | Path):
        return read_state(path_or_state), str(path_or_state)
    return _without_prefix(path_or_state), "the checkpoint"


def _without_prefix(state: State) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _mae_key(name: str, model: CAVMAE) -> str | None:
    """Return the MAE key that a parameter comes from; None if it keeps its value."""
    module, _, rest = name.partition(".")
    if module in ("modality_a", "modality_v", "decoder_modality_a", "decoder_modality_v"):
        return None
    if module in ("pos_embed_a", "decoder_pos_embed_a"):
        return None
    if module in ("blocks_a", "blocks_v", "decoder_blocks"):
        if any(norm in rest for norm in ("norm1_", "norm2_")):
            return None
        return f"{module.removesuffix('_a').removesuffix('_v')}.{rest}"
    if module == "blocks_u":
        number, _, rest = rest.partition(".")
        for suffix in ("_a.", "_v."):
            rest = rest.replace(suffix, ".")
        return f"blocks.{model.config.modality_depth + int(number)}.{rest}"
    return ".".join([module.removesuffix("_a").removesuffix("_v"), rest]).rstrip(".")


def _adapt(name: str, source: torch.Tensor) -> torch.Tensor:
    module = name.partition(".")[0]
    if module in ("pos_embed_v", "decoder_pos_embed_v"):
        return source[:, 1:]  # MAE's first position is that of its class token
    if name == "patch_embed_a.proj.weight":
        return source.sum(dim=1, keepdim=True)
    if module == "decoder_pred_a":
        return source[:256]
    return source


def _check_classes(source: str, state: State, classes: int) -> None:
    """Check that the head of a fine-tuned checkpoint has as many classes as the model."""
    name = "mlp_head.1.weight"
    if name in state and len(state[name]) != classes:
        raise ValueError(
            f"{source} has {len(state[name])} classes ({name} {tuple(state[name].shape)}) and the "
            f"model {classes}; build the classifier with classes={len(state[name])} to use its "
            "head, or start from a pretraining checkpoint to train a new one"
        )


def _check_keys(state: State, expected: Iterable[str], fix: str, optional: str = "") -> None:
    expected = list(expected)
    missing = [name for name in expected if name not in state and name != optional]
    unexpected = [name for name in state if name not in expected]
    if not missing and not unexpected:
        return
    lines = []
    if missing:
        lines.append(f"{len(missing)} tensors are missing: {_some(missing)}")
    if unexpected:
        shapes = [f"{name} {tuple(state[name].shape)}" for name in unexpected]
        lines.append(f"{len(unexpected)} tensors are unexpected: {_some(shapes)}")
    raise ValueError(f"the checkpoint does not fit the model; {'; '.join(lines)}. {fix}")


def _check_shapes(tensors: Mapping[str, tuple[str, torch.Tensor]], expected: State) -> None:
    """`tensors` holds, by parameter name, the name in the checkpoint and the tensor."""
    wrong = [
        f"{source} has shape {tuple(tensor.shape)} and the model's {name} "
        f"{tuple(expected[name].shape)}"
        for name, (source, tensor) in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model; {len(wrong)} tensors differ in shape: "
            f"{_some(wrong)}. Set model.width, model.decoder_width, model.audio_frames (16 times "
            "the columns of pos_embed_a) and model.image_size to the checkpoint's"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
