"""The card of a model: what it is, how it is fed, and, where a run made it, what it was trained on
and how it scored.

Nothing is on it that the files of the run do not say. The licence is left to whoever publishes the
weights, and the card says so.
"""

import dataclasses
from collections.abc import Iterable

from huggingface_hub import ModelCard, ModelCardData

from cavmae.trainer.release.model_spec import ModelSpec

NOT_TOLD = "## Training\n\nNot told: these weights were saved without their run.\n"

_SNIPPET = """\
import numpy as np
import torch
from PIL import Image

from cavmae.dataloaders.loading.augment import center_crop
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.trainer.release.hub import {class_name}

model = {class_name}.from_pretrained(".")  # this folder, or a repository of the Hub
sizes, made = model.description.model, model.description.preprocessing

sound = torch.zeros(2 * made.audio_hz)  # yours: mono, -1 to 1
spectrogram = log_mel([sound], sizes.mel_bins, sizes.audio_frames, torch.device("cpu"))
spectrogram = (spectrogram - made.log_mel_mean) / made.log_mel_std

picture = Image.new("RGB", (340, 256))  # yours
(width, height), side = picture.size, sizes.image_size
top, left, bottom, right = center_crop(height, width, side)
box = (left * width, top * height, right * width, bottom * height)
picture = picture.resize((side, side), Image.Resampling.BILINEAR, box)
pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
mean, deviation = (
    torch.tensor(of)[:, None, None] for of in (made.image_mean, made.image_std)
)
frame = (pixels - mean) / deviation

with torch.no_grad():
    {use}
"""
_USES = {
    "": (
        "sound_embedding = model.embed_audio(spectrogram)  # (1, width)\n"
        "    picture_embedding = model.embed_video(frame)  # (1, width)"
    ),
    "multimodal": 'logits = model(spectrogram, frame, "multimodal").logits  # (1, classes)',
    "videoonly": 'logits = model(None, frame, "videoonly").logits  # (1, classes)',
    "audioonly": 'logits = model(spectrogram, None, "audioonly").logits  # (1, classes)',
}
_TASKS = {
    "": "feature-extraction",
    "multimodal": "video-classification",
    "videoonly": "video-classification",
    "audioonly": "audio-classification",
}
_READS = {
    "multimodal": "a sound and a picture of one moment",
    "videoonly": "a picture",
    "audioonly": "a sound",
}
_LICENCE = """\
**Licence: not chosen.** Whoever publishes these weights sets `license` at the top of this file and
replaces this paragraph. The training clips, and weights that training started from, may have terms
that bind the choice.
"""
_LIMITS = """\
## Limits

The model takes sound of {seconds:g} s ({frames} frames; shorter sound is padded, longer cut) and
one picture of {side} x {side} pixels. What is not named above was not measured: how it does on
other kinds of clips is not known, and it may have learned whatever bias its training clips have.
"""


def model_card(description: ModelSpec, provenance: str = NOT_TOLD) -> ModelCard:
    """The card of a model.

    Args:
        description: of the model.
        provenance: Markdown sections: where the weights come from, training, scores.
    """
    if not description.mode:
        title = "CAV-MAE, pretrained"
        says = "Embeds sounds and pictures in one space."
    else:
        title = f"CAV-MAE, fine-tuned to {description.classes} classes"
        says = f"Gives logits of classes for {_READS[description.mode]}."
    data = ModelCardData(
        license="unknown",
        library_name="cavmae",
        pipeline_tag=_TASKS[description.mode],
        tags=["audio", "audio-visual", "cav-mae", "self-supervised-learning", "video"],
    )
    class_name = "HubCAVMAEClassifier" if description.classes else "HubCAVMAE"
    snippet = _SNIPPET.format(class_name=class_name, use=_USES[description.mode])
    sizes, made = description.model, description.preprocessing
    limits = _LIMITS.format(
        seconds=sizes.audio_frames * made.hop_samples / made.audio_hz,
        frames=sizes.audio_frames,
        side=sizes.image_size,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}\n",
        f"A contrastive audio-visual masked autoencoder ([Gong et al., ICLR 2023]"
        f"(https://arxiv.org/abs/2210.07839)), made by `cavmae`. {says}\n",
        _LICENCE,
        f"## Use\n\n```python\n{snippet}```\n",
        "Graphs (`.pt2`, `.onnx`) beside this file take `spectrogram` as `log_mel`, and `frame`.\n",
        "The values of `config.json`:\n",
        table(("preprocessing", "value"), dataclasses.asdict(made).items()),
        table(("model", "value"), dataclasses.asdict(sizes).items()),
        provenance,
        limits,
    ]
    return ModelCard("\n".join(parts))


def table(heads: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
