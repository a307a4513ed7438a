"""Initial weights: published CAV-MAE checkpoints and ImageNet MAE ones, and for fine-tuning those
of a pretraining run.

Files are read with `weights_only=True`, so that a checkpoint cannot run code. A key that does not
fit is an error, never a silently random layer.
"""

import dataclasses
import math
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cavmae.trainer.model.adapt_positions import adapt_positions, grid_of
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import VIDEO_ONLY, CAVMAEClassifier
from cavmae.trainer.model.config import ModelConfig
from cavmae.trainer.model.encoder import PATCH

State = Mapping[str, torch.Tensor]

_LISTED = 8
_WRAPPERS = {"module", "_orig_mod"}
"""Parts that DistributedDataParallel and torch.compile add to the names of parameters."""
PRETRAINING_FIX = (
    "Set model.modality_depth, model.joint_depth and model.decoder_depth to the checkpoint's, or "
    "take a checkpoint with its decoder and without a classifier"
)
CLASSIFIER_FIX = (
    "Set model.modality_depth and model.joint_depth to the checkpoint's; an audio-only checkpoint "
    "fits a classifier built with video=False"
)


def load_initial_weights(
    model: CAVMAE | CAVMAEClassifier, path: str | Path, *, new_decoder: bool = False
) -> None:
    """Start `model` from a checkpoint, in place: the `initial_weights` of a run.

    Position tables of another audio length, image size or number of mel bins become the model's
    (`adapt_positions`). Only a start adapts: whatever reads the weights of a trained model
    (resuming, evaluation, export, `cavmae.load`, `from_pretrained`) loads them with
    `load_published` or `load_classifier_weights`, where another size is an error, because an
    adapted model was never trained and would answer all the same.

    Args:
        model: of pretraining or fine-tuning.
        path: a CAV-MAE state dict, published (with or without `module.` prefixes) or our own
            `weights.pt`; or for pretraining an ImageNet MAE checkpoint.
        new_decoder: whether the decoder of a pretraining model keeps its values, and that of the
            file, if any, is skipped.

    Raises:
        ValueError: a file that is neither, or whose tensors do not fit the model.
        FileNotFoundError: no such file.
    """
    state, source = read_state(path), str(path)
    if isinstance(model, CAVMAEClassifier):
        load_classifier_weights(model, adapt_positions(state, model, source), source)
    elif "patch_embed_a.proj.weight" in state:
        if new_decoder:
            own = {name: one for name, one in model.state_dict().items() if _is_of_decoder(name)}
            state = {name: one for name, one in state.items() if not _is_of_decoder(name)} | own
        load_published(model, adapt_positions(state, model, source), source)
    elif "patch_embed.proj.weight" in state:
        model.load_state_dict(adapt_mae(state, model, source, new_decoder=new_decoder))
    else:
        raise ValueError(
            f"{path} holds neither CAV-MAE weights (patch_embed_a.proj.weight) nor ImageNet MAE "
            f"weights (patch_embed.proj.weight); {_first_keys(state)}"
        )


def load_published(
    model: CAVMAE, path_or_state: str | Path | State, source: str = "the checkpoint"
) -> None:
    """Load a published CAV-MAE pretraining checkpoint into `model`, in place.

    Position tables are loaded as they are, and must be of the model's sizes.

    Args:
        path_or_state: file, or state dict with or without `module.` prefixes.
        source: of a state dict, for messages.

    Raises:
        ValueError: a missing, unexpected or wrongly shaped tensor, with its shapes.
        FileNotFoundError: no such file.
    """
    state, source = _read(path_or_state, source)
    _check_decoder(source, state, model)
    expected = model.state_dict()
    _check_keys(source, state, expected, PRETRAINING_FIX)
    _check_shapes(source, {name: (name, state[name]) for name in state}, model)
    model.load_state_dict(dict(state))


def load_classifier_weights(
    model: CAVMAEClassifier, path_or_state: str | Path | State, source: str = "the checkpoint"
) -> list[str]:
    """Load a pretraining or a fine-tuned CAV-MAE checkpoint into `model`, in place.

    The decoder of a pretraining checkpoint is skipped, and for an audio-only `model` everything
    that only video uses. All other tensors must fit, position tables too.

    Args:
        path_or_state: file or state dict, ours (`weights.pt`) or published, with or without
            `module.` prefixes.
        source: of a state dict, for messages.

    Returns:
        The parameters that the checkpoint does not have and that keep their values: those of the
        head for a pretraining checkpoint, none for a fine-tuned one.

    Raises:
        ValueError: a checkpoint of another architecture, another number of classes, or a missing,
            unexpected or wrongly shaped tensor, with its shapes.
        FileNotFoundError: no such file.
    """
    state, source = _read(path_or_state, source)
    if "patch_embed_a.proj.weight" not in state:
        raise ValueError(
            f"{source} holds no CAV-MAE weights (patch_embed_a.proj.weight); {_first_keys(state)}. "
            "Fine-tuning starts from a CAV-MAE checkpoint: pretrain from this one first, or take "
            "the weights.pt of a pretraining run"
        )
    skipped = [] if model.has_video else [*VIDEO_ONLY]
    state = {
        name: tensor
        for name, tensor in state.items()
        if not _is_of_decoder(name) and name.split(".")[0] not in skipped
    }
    expected = model.state_dict()
    head = [name for name in expected if name.startswith("mlp_head.")]
    kept = [] if any(name in state for name in head) else head
    _check_classes(source, state, model.classes)
    _check_keys(source, state, [name for name in expected if name not in kept], CLASSIFIER_FIX)
    _check_shapes(source, {name: (name, state[name]) for name in state}, model)
    model.load_state_dict(expected | state)
    return kept


def adapt_mae(
    source_state: State,
    model: CAVMAE,
    file: str = "the checkpoint",
    *,
    new_decoder: bool = False,
) -> dict[str, torch.Tensor]:
    """Convert weights of an ImageNet MAE (He et al. 2022) for both modalities, as published.

    Both modality encoders start from the first blocks and the joint encoder from the last ones;
    the audio patch projection is the sum over the image channels; image positions are adapted to
    the model's image size. Parameters without a counterpart in MAE keep their value in `model`:
    modality vectors, audio positions, the norms of single streams.

    Args:
        source_state: checkpoint, with or without `module.` prefixes.
        model: gives sizes and the values that are kept; it is not changed.
        file: where the checkpoint comes from, for messages.
        new_decoder: whether the decoder keeps its values too; otherwise the checkpoint has one.

    Returns:
        A whole state dict for `model`.

    Raises:
        ValueError: a missing, unused or wrongly shaped tensor, with its shapes.
    """
    source = _without_prefix(source_state, file)
    state = dict(model.state_dict())
    sources = {name: key for name in state if (key := _mae_key(name, model)) is not None}
    if new_decoder:
        source = {name: one for name, one in source.items() if not _is_of_decoder(name)}
        sources = {name: key for name, key in sources.items() if not _is_of_decoder(name)}
    else:
        _check_decoder(file, source, model)
    expected = [*dict.fromkeys(sources.values()), "cls_token"]
    fix = f"{PRETRAINING_FIX}, or set new_decoder, which begins the decoder anew"
    _check_keys(file, source, expected, fix, optional="cls_token")
    adapted = {name: _adapt(name, source[key]) for name, key in sources.items()}
    adapted = adapt_positions(adapted, model, file)
    _check_shapes(file, {name: (sources[name], tensor) for name, tensor in adapted.items()}, model)
    return state | adapted


def sizes_of(state: State, source: str) -> ModelConfig:
    """Return the sizes that the tensors of CAV-MAE weights tell, with the heads of the published
    models: 12 at width 768, 16 above, one for each 64 channels below; and with 128 mel bins where
    the position table does not tell them.

    Raises:
        ValueError: tensors are missing; `source` is named.
    """
    try:
        width = state["patch_embed_a.proj.weight"].shape[0]
        positions = state["pos_embed_a"]
    except KeyError as error:
        raise ValueError(
            f"{source} has no {error.args[0]}, so it holds no CAV-MAE weights; {_first_keys(state)}"
        ) from error
    published = ModelConfig()
    rows = published.audio_grid[0]
    rows, columns = grid_of(positions) or (rows, positions.shape[1] // rows)
    sizes = dataclasses.replace(
        published,
        audio_frames=columns * PATCH,
        mel_bins=rows * PATCH,
        width=width,
        heads=16 if width > published.width else max(1, width // 64),
        modality_depth=_depth(state, "blocks_a"),
        joint_depth=_depth(state, "blocks_u"),
    )
    if "pos_embed_v" in state:
        side = math.isqrt(state["pos_embed_v"].shape[1]) * PATCH
        sizes = dataclasses.replace(sizes, image_size=side)
    if "decoder_pos_embed_a" in state:
        sizes = dataclasses.replace(
            sizes,
            decoder_width=state["decoder_pos_embed_a"].shape[2],
            decoder_depth=_depth(state, "decoder_blocks"),
            decoder=_decoder_kind(state) or "self",
        )
    return sizes


def _decoder_kind(state: State) -> Literal["self", "cross"] | None:
    """Return the attention of a decoder's blocks; None where there are none."""
    if not _depth(state, "decoder_blocks"):
        return None
    return "cross" if "decoder_blocks.0.cross_attn.q.weight" in state else "self"


def _is_of_decoder(name: str) -> bool:
    return name.startswith(("decoder_", "mask_token"))


def _depth(state: State, blocks: str) -> int:
    """Count the blocks of an encoder or decoder."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{blocks}.")})


def published_state(model: CAVMAE | CAVMAEClassifier) -> dict[str, torch.Tensor]:
    """Return a state dict with the names of the published files, which the published code loads."""
    return {f"module.{name}": tensor for name, tensor in model.state_dict().items()}


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file by name, without the prefixes of wrapped models.

    Args:
        path: of a file that torch wrote, or of one that ends in .safetensors.

    Raises:
        ValueError: a file that holds more than tensors and plain containers, no tensors, or one
            that is no weight: of whole numbers, or with values that are not finite.
        FileNotFoundError: no such file.
    """
    try:
        if Path(path).suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint of tensors, or holds Python objects that could run code when "
            "read; save the bare state dict (torch.save(model.state_dict(), ...)) where you trust "
            "the file"
        ) from error
    # A file that is no zip is read as a pickle stream, which fails in many ways.
    except (
        *(RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError),
        *(struct.error, OSError, SafetensorError),
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({reason}); copy or download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # MAE checkpoints keep the weights beside other things
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    other = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        weights = next(
            (
                key
                for key, value in content.items()
                if isinstance(value, dict)
                and any(isinstance(tensor, torch.Tensor) for tensor in value.values())
            ),
            None,
        )
        part = "" if weights is None else f": torch.save(torch.load(FILE)[{weights!r}], NEW_FILE)"
        raise ValueError(
            f"{path} holds values that are no tensors, such as {', '.join(other[:_LISTED])}; "
            f"save the bare state dict{part}"
        )
    for name, tensor in content.items():
        _check_is_weight(f"{path}: tensor {name}", tensor)
    return _without_prefix(content, str(path))


def _check_is_weight(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} is of {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-"
            "point numbers; take the checkpoint from before it was quantised or converted"
        )
    finite = tensor.float().isfinite()
    if not finite.all():
        raise ValueError(
            f"{name} has {int((~finite).sum())} NaN or infinite values of {tensor.numel()}; take a "
            "checkpoint from before its training diverged"
        )


def _read(path_or_state: str | Path | State, source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Return tensors without the prefixes of wrapped models, and their source for messages."""
    if isinstance(path_or_state, str | Path):
        return read_state(path_or_state), str(path_or_state)
    return _without_prefix(path_or_state, source), source


def _without_prefix(state: State, source: str) -> dict[str, torch.Tensor]:
    bare = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): tensor
        for name, tensor in state.items()
    }
    if len(bare) < len(state):
        raise ValueError(
            f"{source} holds {len(state) - len(bare)} tensors twice, with and without `module.` or "
            "`_orig_mod.` in their names; save one set of weights"
        )
    return bare


def _first_keys(state: State) -> str:
    """Describe a state that was not recognised, for an error."""
    text = f"its first keys are {sorted(state)[:_LISTED]}"
    for name in state:
        prefix, kernel, _ = name.partition("patch_embed")
        if prefix and kernel:
            return f"{text}: take {prefix!r} off the names"
    return text


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


def _check_decoder(source: str, state: State, model: CAVMAE) -> None:
    """Check that a checkpoint's decoder attends as the model's does."""
    theirs, ours = _decoder_kind(state), model.config.decoder
    if theirs not in (None, ours):
        raise ValueError(
            f"{source} has a decoder of {theirs}-attention and the model one of {ours}-attention "
            f"(model.decoder); set model.decoder to {theirs}, or start a run from these weights "
            "with new_decoder, which begins the decoder anew"
        )


def _check_keys(
    source: str, state: State, expected: Iterable[str], fix: str, optional: str = ""
) -> None:
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
    raise ValueError(f"{source} does not fit the model; {'; '.join(lines)}. {fix}")


def _check_shapes(
    source: str,
    tensors: Mapping[str, tuple[str, torch.Tensor]],
    model: CAVMAE | CAVMAEClassifier,
) -> None:
    """`tensors` holds, by parameter name, the name in the checkpoint and the tensor."""
    expected = model.state_dict()
    wrong = [
        f"{key} has shape {tuple(tensor.shape)} and the model's {name} "
        f"{tuple(expected[name].shape)}"
        for name, (key, tensor) in tensors.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        sizes = _sizes({name: tensor for name, (_, tensor) in tensors.items()}, model.config)
        raise ValueError(
            f"{source} does not fit the model; {len(wrong)} tensors differ in shape: "
            f"{_some(wrong)}. {sizes}"
        )


def _sizes(state: State, sizes: ModelConfig) -> str:
    """Say which of a model's sizes are to be set, and to what, for the tensors of a checkpoint."""
    rows = sizes.mel_bins // 16
    found = {
        "width": ("norm.weight", lambda shape: shape[0]),
        "decoder_width": ("decoder_norm.weight", lambda shape: shape[0]),
        "audio_frames": ("pos_embed_a", lambda shape: 16 * shape[1] // rows),
        "image_size": ("pos_embed_v", lambda shape: 16 * math.isqrt(shape[1])),
    }
    fix = [
        f"model.{field} to {size}" + (f" (with {rows * 16} mel bins)" * (field == "audio_frames"))
        for field, (name, size_of) in found.items()
        if name in state and (size := size_of(state[name].shape)) != getattr(sizes, field)
    ]
    return f"Set {', '.join(fix)}" if fix else "It is of another architecture"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
