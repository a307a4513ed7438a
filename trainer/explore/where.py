"""*Where*: which patches of a picture go with a sound, and which of a sound with a picture.

A value is the cosine of two vectors: a token of one modality, and the mean of tokens of the other,
all of them or those around a place. The tokens are those after the last norm of their modality,
unmasked, whose mean over all patches is the embedding that the contrast was trained on: so the
vectors are in the space that was trained, but only the mean of them was. Nothing taught the model
to keep a thing in the token of its own patch. Attention mixes all patches of a modality before, and
a patch of high value need not show what sounds; it may be background that goes along with it. The
values of a map are to be compared with each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from cavmae.dataloaders.constants import AUDIO_HZ, HOP_SAMPLES, WINDOW_SAMPLES
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.trainer.explore.pictures import enlarged, outlined, painted, spectrogram_picture
from cavmae.trainer.inference.media import Window
from cavmae.trainer.inference.model import Model


@dataclass(frozen=True)
class Side:
    """The patches of a sound or of a picture, and where they lie in what is shown of it.

    Attributes:
        shown: the picture, or a picture of the spectrogram.
        tokens: (tokens, width) float32, after the modality's last norm.
        boxes: (tokens, 4) float64: left, top, right and bottom, as fractions of `shown`.
        used: (tokens,) bool; False: of padding alone, which has no value.
    """

    shown: Image.Image
    tokens: torch.Tensor
    boxes: torch.Tensor
    used: torch.Tensor

    def around(self, x: float, y: float, patches: int = 1) -> torch.Tensor:
        """Choose the square of patches around the one at a place.

        Args:
            x, y: of the place, as fractions of the width and the height of `shown`.
            patches: of a side of the square, an odd number.

        Returns:
            (tokens,) bool, without patches that are not used.

        Raises:
            ValueError: no patch is there, or one that is not used.
        """
        left, top, right, bottom = self.boxes.T
        here = (left <= x) & (x < right) & (top <= y) & (y < bottom)
        if not (here & self.used).any():
            raise ValueError(
                f"at {x:.0%} from the left and {y:.0%} from the top is nothing that the model was "
                "given; choose a place in the coloured part"
            )
        x0, y0, x1, y1 = self.boxes[here][0].tolist()
        reach = patches / 2  # centres that lie in the square are half a patch away from its edges
        across = ((left + right) / 2 - (x0 + x1) / 2).abs() < reach * (x1 - x0)
        down = ((top + bottom) / 2 - (y0 + y1) / 2).abs() < reach * (y1 - y0)
        return across & down & self.used

    def mean(self, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Average the (tokens,) bool chosen tokens; of all tokens it is the embedding: (width,)."""
        return (self.tokens if chosen is None else self.tokens[chosen]).mean(dim=0)

    def cosines(self, vector: torch.Tensor) -> torch.Tensor:
        """Compare a vector (width,) with each token: (tokens,) float32, NaN where not used."""
        return F.cosine_similarity(self.tokens, vector[None], dim=1).where(self.used, torch.nan)

    def painted(self, cosines: torch.Tensor) -> Image.Image:
        """Lay `cosines` over what is shown."""
        return painted(self.shown, self.boxes, cosines)

    def outlined(self, chosen: torch.Tensor) -> Image.Image:
        """Show what is shown with a frame around the (tokens,) bool chosen patches."""
        return outlined(self.shown, self.boxes[chosen])


@dataclass(frozen=True, eq=False)  # Gradio's states are told apart by their hash
class Scene:
    """A sound and a picture, as a model takes them.

    Attributes:
        audio, video: their patches.
        seconds: that the width of the spectrogram stands for.
    """

    audio: Side
    video: Side
    seconds: float

    @property
    def cosine(self) -> float:
        """Of the two embeddings: the score that search goes by."""
        return F.cosine_similarity(self.audio.mean(), self.video.mean(), dim=0).item()

    def best_stretch(self, cosines: torch.Tensor) -> tuple[float, float]:
        """Return start and end, in seconds, of the column of patches of the sound whose mean of
        (tokens,) cosines is the highest."""
        starts = self.audio.boxes[:, 0]
        means = {start: cosines[starts == start].nanmean() for start in starts.unique().tolist()}
        best = max(means, key=lambda start: means[start].nan_to_num(-torch.inf).item())
        width = (self.audio.boxes[0, 2] - self.audio.boxes[0, 0]).item()
        return best * self.seconds, (best + width) * self.seconds


def look(model: Model, heard: Window, seen: Window) -> Scene:
    """Encode the sound of a window and the picture of one, as far as the model hears and sees.

    Args:
        model: of both modalities.
        heard, seen: may be the same.

    Raises:
        ValueError: there is no sound or no picture, or one can't be used; as of `Model.embed`.
    """
    if heard.audio is None or seen.frame is None:
        lacks = "sound" if heard.audio is None else "picture"
        raise ValueError(f"there is no {lacks}; choose a clip that has one")
    frames, bins = model.config.model.audio_frames, model.config.model.mel_bins
    sound = heard.audio[: (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES]
    of_sound, of_picture = model.embed(
        [(sound, AUDIO_HZ), Image.fromarray(seen.frame)], windows=True, tokens=True
    )
    assert of_sound.audio_tokens is not None and of_picture.video_tokens is not None
    present = (len(sound) - WINDOW_SAMPLES) // HOP_SAMPLES + 1
    values = log_mel([torch.from_numpy(sound)], bins, frames, torch.device("cpu"))[0].T
    low, high = values[:, :present].min().item(), values[:, :present].max().item()
    values[:, present:] = torch.nan  # (mel_bins, audio_frames)
    seconds = frames * HOP_SAMPLES / AUDIO_HZ
    start, end, lowest, highest = of_sound.audio_tokens.places[0].T
    boxes = torch.stack(
        [start / seconds, 1 - highest / bins, end / seconds, 1 - lowest / bins], dim=1
    )
    used = start < present * HOP_SAMPLES / AUDIO_HZ
    tokens = of_picture.video_tokens.values[0]
    return Scene(
        Side(spectrogram_picture(values, low, high), of_sound.audio_tokens.values[0], boxes, used),
        Side(
            enlarged(Image.fromarray(seen.frame)),
            tokens,
            of_picture.video_tokens.places[0],
            torch.ones(len(tokens), dtype=torch.bool),
        ),
        seconds,
    )
