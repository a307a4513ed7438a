"""`Model`: one call from files, arrays and pictures to embeddings, classes and reconstructions."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar, cast, overload

import torch

from cavmae.dataloaders.config import DataConfig
from cavmae.dataloaders.constants import AUDIO_HZ, HOP_SAMPLES, WINDOW_SAMPLES
from cavmae.dataloaders.loading.augment import center_crop
from cavmae.dataloaders.loading.dali import ClipDecoder
from cavmae.dataloaders.loading.reader import EncodedClip, ReadTask
from cavmae.dataloaders.media.log_mel import log_mel
from cavmae.kernels import MaskMode
from cavmae.trainer.config.configs import PretrainConfig, RunConfig
from cavmae.trainer.evaluation.reconstruct import (
    Direction,
    Reconstruction,
    reconstruct_clip,
    removal_masks,
    removed_ratios,
)
from cavmae.trainer.inference.media import Medium, Window, name_of, windows_of
from cavmae.trainer.inference.results import Classification, Embedding, Tokens
from cavmae.trainer.metrics.classification import probabilities
from cavmae.trainer.model.cavmae import CAVMAE
from cavmae.trainer.model.classifier import CAVMAEClassifier, Mode
from cavmae.trainer.model.encoder import PATCH
from cavmae.trainer.release.model_spec import ModelSpec

Failed = Callable[[int, Exception], object]
Row = TypeVar("Row")
Between = tuple[Literal["audio", "video"], Literal["audio", "video"]]


@dataclass(frozen=True)
class _Encoded:
    """Embedding of one modality of a window, and its tokens if they are kept."""

    vector: torch.Tensor
    tokens: torch.Tensor | None


@dataclass(frozen=True)
class _Row:
    """A window that was embedded; of the picture its height and width."""

    seconds: tuple[float, float]
    audio: _Encoded | None
    video: _Encoded | None
    picture: tuple[int, int]


class Model:
    """A trained model with its preprocessing; `cavmae.load` makes it.

    Args:
        network: on its device and in its dtype, set to evaluate.
        spec: its kind, its labels and what it was trained with.
        config: of its run, or one with its sizes and its preprocessing.
        batch: windows that are computed together.

    Attributes:
        network, spec, config: those.
    """

    def __init__(
        self,
        network: CAVMAE | CAVMAEClassifier,
        spec: ModelSpec,
        config: RunConfig,
        batch: int = 16,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch is {batch}; use 1 or more")
        self.network, self.spec, self.config = network, spec, config
        self._batch = batch

    @property
    def window_seconds(self) -> float:
        """Length of the windows that longer media are cut into: what the model hears, or the run's
        `data.window_seconds`."""
        frames = self.config.model.audio_frames
        heard = ((frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES) / AUDIO_HZ
        return self.config.data.window_seconds or heard

    @overload
    def embed(
        self,
        media: Medium,
        *,
        windows: bool | None = ...,
        tokens: bool = ...,
        window_seconds: float = ...,
    ) -> Embedding: ...
    @overload
    def embed(
        self,
        media: list[Medium],
        *,
        windows: bool | None = ...,
        tokens: bool = ...,
        window_seconds: float = ...,
    ) -> list[Embedding]: ...
    def embed(
        self,
        media: Medium | list[Medium],
        *,
        windows: bool | None = None,
        tokens: bool = False,
        window_seconds: float = 0.0,
    ) -> Embedding | list[Embedding]:
        """Embed sounds, pictures and videos, unmasked.

        Args:
            media: a path or URL of a sound, a picture or a video; `(samples, rate)`, a waveform
                and its samples per second; a PIL picture; or a list of these.
            windows: return each window's embedding instead of their mean; None: of a model that was
                trained on `data.window_seconds`. A medium longer than the model hears is cut into
                windows; a shorter one is padded, as the loader does.
            tokens: return the tokens of all patches as well.
            window_seconds: length of the windows; 0: `Model.window_seconds`.

        Returns:
            An embedding; of a list, one for each.

        Raises:
            ValueError: a medium can't be used; says which, and why. Or a model that lacks an
                encoder for it.
            OSError: a file or URL can't be read.
        """
        many = media if isinstance(media, list) else [media]
        each = self.embed_each(many, windows=windows, tokens=tokens, window_seconds=window_seconds)
        found = [embedding for _, embedding in each]
        return found if isinstance(media, list) else found[0]

    @torch.no_grad()
    def embed_each(
        self,
        media: Iterable[Medium],
        *,
        windows: bool | None = None,
        tokens: bool = False,
        window_seconds: float = 0.0,
        failed: Failed | None = None,
    ) -> Iterator[tuple[int, Embedding]]:
        """Yield the number and the embedding of one medium after the other; see `embed`.

        Args:
            failed: is called with the number and the error of a medium that can't be used, instead
                of an error.
        """
        if windows is None:
            windows = self.config.data.window_seconds > 0

        def compute(batch: Sequence[Window]) -> list[_Row]:
            heard = [one for one in batch if one.audio is not None]
            seen = [one for one in batch if one.frame is not None]
            audio = self.network.audio_tokens(self._spectrograms(heard)) if heard else ()
            video = self.network.video_tokens(self._frames(seen)) if seen else ()
            sounds = iter([_encoded(one, tokens) for one in audio])
            pictures = iter([_encoded(one, tokens) for one in video])
            return [
                _Row(
                    one.seconds,
                    None if one.audio is None else next(sounds),
                    None if one.frame is None else next(pictures),
                    (1, 1) if one.frame is None else one.frame.shape[:2],
                )
                for one in batch
            ]

        for number, rows in self._by_medium(media, window_seconds, compute, failed):
            yield number, self._embedding(rows, windows, tokens)

    def similarity(
        self,
        a: Medium | Embedding | list[Medium] | list[Embedding],
        b: Medium | Embedding | list[Medium] | list[Embedding],
        between: Between | None = None,
    ) -> torch.Tensor:
        """Compute cosines between the embeddings of two sides.

        Args:
            a, b: media, or embeddings without windows.
            between: modality of `a` and of `b` that are compared; None: the sound of `a` with the
                pictures of `b` where there are both, else the other way round, else what both have.

        Returns:
            (a, b) float32.

        Raises:
            ValueError: as of `embed`, or sides that do not have these modalities.
        """
        sides = [self._embeddings(one) for one in (a, b)]
        choices: list[Between] = [
            ("audio", "video"),
            ("video", "audio"),
            ("audio", "audio"),
            ("video", "video"),
        ]
        for kinds in [between] if between else choices:
            pairs = zip(sides, kinds, strict=True)
            vectors = [[getattr(one, kind) for one in side] for side, kind in pairs]
            if all(vector is not None for side in vectors for vector in side):
                units = [
                    torch.nn.functional.normalize(torch.stack(side), dim=1) for side in vectors
                ]
                return units[0] @ units[1].T
        wanted = f"{between[0]} in a and {between[1]} in b" if between else "in common"
        raise ValueError(
            f"the sides have no {wanted} in all their media; give sounds on one side and pictures "
            "on the other, or set between"
        )

    @overload
    def classify(self, media: Medium, *, windows: bool = ...) -> Classification: ...
    @overload
    def classify(self, media: list[Medium], *, windows: bool = ...) -> list[Classification]: ...
    def classify(
        self, media: Medium | list[Medium], *, windows: bool = False
    ) -> Classification | list[Classification]:
        """Classify media with a fine-tuned model, by sound and picture or by the one there is.

        Args:
            media: as of `embed`.
            windows: return each window's scores; otherwise their mean.

        Raises:
            ValueError: as of `embed`, or the model has no classifier, or does not take what there
                is.
            OSError: a file or URL can't be read.
        """
        many = media if isinstance(media, list) else [media]
        found = [made for _, made in self.classify_each(many, windows=windows)]
        return found if isinstance(media, list) else found[0]

    @torch.no_grad()
    def classify_each(
        self,
        media: Iterable[Medium],
        *,
        windows: bool = False,
        failed: Failed | None = None,
    ) -> Iterator[tuple[int, Classification]]:
        """Yield the number and the classes of one medium after the other; see `classify`.

        Args:
            failed: as of `embed_each`.
        """
        network = self.network
        if not isinstance(network, CAVMAEClassifier):
            raise ValueError("this model has no classifier; load a fine-tuned one")
        labels = self.spec.labels or tuple(str(number) for number in range(self.spec.classes))

        def compute(batch: Sequence[Window]) -> list[tuple[tuple[float, float], torch.Tensor]]:
            made: dict[int, torch.Tensor] = {}
            modes = [self._mode(one) for one in batch]
            for mode in dict.fromkeys(modes):
                numbers = [number for number, one in enumerate(modes) if one == mode]
                some = [batch[number] for number in numbers]
                heard = None if some[0].audio is None else self._spectrograms(some)
                seen = None if some[0].frame is None else self._frames(some)
                logits = network(heard, seen, mode).logits.float().cpu()
                made |= dict(zip(numbers, logits, strict=True))
            return [(one.seconds, made[number]) for number, one in enumerate(batch)]

        for number, rows in self._by_medium(media, 0.0, compute, failed):
            logits = torch.stack([values for _, values in rows])
            scores = probabilities(logits, self.spec.loss)
            seconds = _seconds([one for one, _ in rows])
            yield (
                number,
                Classification(labels, scores if windows else scores.mean(0), logits, seconds),
            )

    @torch.no_grad()
    def reconstruct(
        self,
        media: Medium | Window,
        *,
        direction: Direction = "joint",
        audio_ratio: float | None = None,
        video_ratio: float | None = None,
        audio_mode: MaskMode | None = None,
        seed: int = 0,
    ) -> Reconstruction:
        """Reconstruct masked patches of the first window of a medium with sound and picture.

        Args:
            media: as of `embed`, or a window of one.
            direction: `joint`: patches of both are removed; the others remove all of one modality.
            audio_ratio, video_ratio: shares of patches removed, with `joint`; None: those of the
                run.
            audio_mode: structure of the audio mask; None: that of the run.
            seed: of the masks.

        Raises:
            ValueError: as of `embed`; a medium without sound or picture; a model without a decoder;
                or ratios that remove nothing or keep nothing.
            OSError: a file or URL can't be read.
        """
        network, run = self.network, self.config
        if not isinstance(network, CAVMAE) or not isinstance(run, PretrainConfig):
            raise ValueError("this model has no decoder; load a pretrained one")
        run = replace(run, mask=replace(run.mask, audio_mode=audio_mode or run.mask.audio_mode))
        ratios = removed_ratios(direction, audio_ratio, video_ratio, run)
        window = media if isinstance(media, Window) else next(self._windows(media, 0.0))
        if window.audio is None or window.frame is None:
            lacks = "sound" if window.audio is None else "picture"
            name = "the window" if isinstance(media, Window) else name_of(media)
            raise ValueError(f"{name} has no {lacks}; give a video with sound")
        position = torch.zeros(1, dtype=torch.long, device=self._device)
        return reconstruct_clip(
            network,
            self._spectrograms([window]),
            self._frames([window]),
            removal_masks(run, position, ratios, seed),
            run,
            samples=len(window.audio),
        )

    def _embeddings(
        self, side: Medium | Embedding | list[Medium] | list[Embedding]
    ) -> list[Embedding]:
        many = side if isinstance(side, list) else [side]
        return [
            one if isinstance(one, Embedding) else self.embed(cast(Medium, one), windows=False)
            for one in many
        ]

    def _windows(self, medium: Medium, window_seconds: float) -> Iterator[Window]:
        """Yield the windows of a medium, with what they have of what the model was trained on.

        Raises:
            ValueError: none has anything; or as of `windows_of`.
        """
        trained = self.config.data.modalities
        if self.spec.mode in ("audioonly", "videoonly"):
            trained = (self.spec.mode.removesuffix("only"),)
        length = window_seconds or self.window_seconds
        nothing = True
        for window in windows_of(medium, length, self.config.data.frame_choice):
            audio = window.audio if "audio" in trained else None
            frame = window.frame if "video" in trained else None
            if audio is not None or frame is not None:
                nothing = False
                yield replace(window, audio=audio, frame=frame)
        if nothing:
            what = "sound" if "audio" in trained else "picture"
            raise ValueError(
                f"{name_of(medium)} has no {what}, and this model was trained on {trained[0]} alone"
            )

    def _by_medium(
        self,
        media: Iterable[Medium],
        window_seconds: float,
        compute: Callable[[Sequence[Window]], list[Row]],
        failed: Failed | None,
    ) -> Iterator[tuple[int, list[Row]]]:
        """Compute windows of one or more media at a time.

        Args:
            media: in order.
            window_seconds: as of `embed`.
            compute: returns the result of each window of a batch.
            failed: as of `embed_each`.

        Yields:
            The number of a medium and the results of its windows, in order.
        """
        batch: list[tuple[int, Window]] = []
        made: dict[int, list[Row]] = {}

        def flush() -> None:
            results = compute([window for _, window in batch])
            for (number, _), result in zip(batch, results, strict=True):
                made[number].append(result)
            batch.clear()

        for number, medium in enumerate(media):
            made[number] = []
            try:
                for window in self._windows(medium, window_seconds):
                    batch.append((number, window))
                    if len(batch) == self._batch:
                        flush()
            except (ValueError, OSError) as error:
                if failed is None:
                    raise
                del made[number]
                batch[:] = [one for one in batch if one[0] != number]
                failed(number, error)
            waiting = {one for one, _ in batch}
            for one in [one for one in made if one not in waiting]:
                yield one, made.pop(one)
        if batch:
            flush()
        yield from made.items()

    def _embedding(self, rows: Sequence["_Row"], windows: bool, tokens: bool) -> Embedding:
        heard = [(row, row.audio) for row in rows if row.audio is not None]
        seen = [(row, row.video) for row in rows if row.video is not None]
        sounds = _seconds([row.seconds for row, _ in heard])
        pictures = _seconds([row.seconds for row, _ in seen])
        vectors = [
            torch.stack([one.vector for _, one in side]) if side else None for side in (heard, seen)
        ]
        if not all(one is None or one.isfinite().all() for one in vectors):
            raise ValueError(
                f"an embedding is not finite in {self._dtype}; load the model with dtype float32, "
                "or look at its weights"
            )
        audio, video = (one if one is None or windows else one.mean(0) for one in vectors)
        if not tokens:
            return Embedding(audio, video, sounds, pictures)
        sizes = [row.picture for row, _ in seen]
        return Embedding(
            audio,
            video,
            sounds,
            pictures,
            _tokens([one for _, one in heard], self._audio_places(sounds)) if heard else None,
            _tokens([one for _, one in seen], self._video_places(sizes)) if seen else None,
        )

    def _mode(self, window: Window) -> Mode:
        """Return how a window is classified: by what it has."""
        if self.spec.mode in ("audioonly", "videoonly"):
            return self.spec.mode
        if window.audio is None:
            return "missingvideoonly"
        return "missingaudioonly" if window.frame is None else "multimodal"

    @property
    def _device(self) -> torch.device:
        return self.network.norm.weight.device

    @property
    def _dtype(self) -> torch.dtype:
        return self.network.norm.weight.dtype

    def _spectrograms(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute (windows, audio_frames, mel_bins), normalised."""
        sizes, data = self.config.model, self.config.data
        sounds = [torch.from_numpy(one.audio) for one in windows]
        heard = log_mel(sounds, sizes.mel_bins, sizes.audio_frames, self._device)
        return ((heard - data.log_mel_mean) / data.log_mel_std).to(self._dtype)

    @cached_property
    def _decoder(self) -> ClipDecoder:
        seen = DataConfig(modality="video")
        return ClipDecoder(False, self.config.model.image_size, self._batch, 2, None, seen)

    def _frames(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute (windows, 3, size, size), normalised, by the loader's graph."""
        size = self.config.model.image_size
        clips = []
        for number, one in enumerate(windows):
            assert one.frame is not None
            height, width, _ = one.frame.shape
            clips.append(
                EncodedClip(
                    task=ReadTask(number, 0, 0, number),
                    sample_id="",
                    labels=(),
                    audio=b"",
                    frames=(b"\0",),
                    pixels=(one.frame,),
                    crop=center_crop(height, width, size),
                    flipped=False,
                    frame_seconds=(0.0,),
                    audio_seconds=(0.0, 0.0),
                )
            )
        self._decoder.schedule(clips)
        frames = torch.from_numpy(self._decoder.collect().frames[:, 0])
        return frames.to(self._device, self._dtype)

    def _audio_places(self, seconds: torch.Tensor) -> torch.Tensor:
        """Return the places of the tokens of windows (windows, 2) as of `Tokens`."""
        rows, columns = self.config.model.audio_grid
        row, column = _grid(rows, columns)
        patch_seconds = PATCH * HOP_SAMPLES / AUDIO_HZ
        begin = seconds[:, :1] + column * patch_seconds  # (windows, tokens)
        bins = [(PATCH * edge).expand_as(begin) for edge in (row, row + 1)]
        return torch.stack([begin, begin + patch_seconds, *bins], dim=2)

    def _video_places(self, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the places of the tokens of pictures of these heights and widths."""
        rows, columns = self.config.model.video_grid
        row, column = _grid(rows, columns)
        crops = [center_crop(*size, self.config.model.image_size) for size in sizes]
        top, left, bottom, right = torch.tensor(crops, dtype=torch.float64).T[..., None]
        across, down = (right - left) / columns, (bottom - top) / rows  # (windows, 1)
        edges = [left + across * column, top + down * row]
        return torch.stack([*edges, edges[0] + across, edges[1] + down], dim=2)


def _grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of each token of a row-major grid, (tokens,) float64 each."""
    numbers = torch.arange(rows * columns)
    return (numbers // columns).double(), (numbers % columns).double()


def _encoded(tokens: torch.Tensor, keep: bool) -> _Encoded:
    tokens = tokens.float()
    return _Encoded(tokens.mean(dim=0).cpu(), tokens.cpu() if keep else None)


def _tokens(parts: Sequence[_Encoded], places: torch.Tensor) -> Tokens:
    return Tokens(torch.stack([one.tokens for one in parts if one.tokens is not None]), places)


def _seconds(windows: Sequence[tuple[float, float]]) -> torch.Tensor:
    return torch.tensor(windows, dtype=torch.float64).reshape(-1, 2)
