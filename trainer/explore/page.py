"""The page: what is looked at on top, and a tab for each way to look at it.

What is looked at is one state of the page, `Page.subject`: a clip of the set or a file. Tabs that
find clips show the one that is chosen in a `ClipView`, whose button makes it what is looked at.

Names, labels and errors come from outside. They are shown by components that take text, never by
Markdown, HTML or a message of Gradio's, which are read as HTML.
"""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np

from cavmae.console import printable
from cavmae.dataloaders.constants import AUDIO_HZ

if TYPE_CHECKING:  # the page is there before torch is imported
    from cavmae.trainer.explore.collection import Collection, Subject
    from cavmae.trainer.inference.model import Model

CSS = """
@media (max-width: 640px) { .tab-container button { padding: 0 0.5em; font-size: 0.9em; } }
.clip img { width: 100%; height: 100%; object-fit: contain; }
.map img { width: 100%; max-width: 720px; cursor: crosshair; }
.found .grid-wrap { max-height: none; }
.found .grid-container { padding-top: 2em;
    grid-template-columns: repeat(auto-fill, minmax(7.5em, 1fr)); }
.found .thumbnail-item { display: flex; flex-direction: column; aspect-ratio: auto; }
.found .thumbnail-item img { height: 110px; }
.found .caption-label { position: static; max-width: none; border-radius: 0;
    white-space: pre-line; overflow-wrap: anywhere; color: var(--body-text-color) !important; }
"""


class Page:
    """What all tabs share; handlers that use it before it is filled wait.

    Attributes:
        subject: state with what is looked at, a `Subject` or None; tabs listen to its changes.
        status: text that says what the command is doing until `fill`.
    """

    subject: gr.State

    def __init__(self) -> None:
        self.status = "starting"
        self._filled = threading.Event()
        self._model_lock = threading.Lock()
        self._collection: Collection | None = None
        self._model: Model | None = None

    def fill(self, collection: "Collection", model: "Model | None") -> None:
        """Let the page show a collection; without a model files can't be looked at."""
        self._collection, self._model = collection, model
        has_media = "" if collection.shards else "; no media at hand"
        has_model = "" if model else "; no model at hand, so no files"
        self.status = f"{len(collection)} clips{has_media}{has_model}"
        self._filled.set()

    @property
    def collection(self) -> "Collection":
        self._filled.wait()
        assert self._collection is not None
        return self._collection

    @contextmanager
    def model(self) -> Iterator["Model"]:
        """Yield the model, to one handler at a time.

        Raises:
            ValueError: there is none at hand.
        """
        self._filled.wait()
        if self._model is None:
            raise ValueError("no model is at hand; start the page with the RUN of the embeddings")
        with self._model_lock:
            yield self._model


class ClipView:
    """Shows a clip or a file: its frame, its sound and what is known of it.

    Args:
        page: that it is part of; with a button that makes the clip what is looked at.
    """

    def __init__(self, page: Page | None) -> None:
        self._row = gr.State(None)
        with gr.Row():
            with gr.Column(min_width=160):
                self._frame = gr.Image(
                    label="Picture",
                    interactive=False,
                    height=240,
                    buttons=["fullscreen"],
                    elem_classes="clip",
                )
            with gr.Column(min_width=240):
                self._sound = gr.Audio(label="Sound", interactive=False, buttons=[])
                self._facts = gr.Textbox(label="Clip", lines=3, interactive=False)
                if page:
                    button = gr.Button("Look at this clip")
                    button.click(
                        lambda row: gr.skip() if row is None else page.collection.subject(row),
                        self._row,
                        page.subject,
                    )
        self.outputs = [self._row, self._frame, self._sound, self._facts]

    def values(self, subject: "Subject | None") -> list[Any]:
        """Return what the components, `outputs`, show of a subject."""
        if subject is None:
            return [None, None, None, ""]
        window, sound = subject.window, None
        if window is not None and window.audio is not None:
            sound = (AUDIO_HZ, (window.audio.clip(-1, 1) * 32767).astype(np.int16))
        frame = None if window is None else window.frame
        return [subject.row, frame, sound, "\n".join([shown(subject.name), shown(subject.facts)])]


def shown(text: str) -> str:
    """Write text that comes from outside for a component that takes text, line by line."""
    return "\n".join(map(printable, text.split("\n")))


def subject_of_file(page: Page, path: str) -> "Subject":
    """Embed a file whole; the window that is shown is its first one.

    Raises:
        ValueError: the file can't be used, or there is no model at hand.
    """
    from cavmae.trainer.explore.collection import Subject
    from cavmae.trainer.inference.media import windows_of

    with page.model() as model:
        found = model.embed(path, windows=False)
        window = next(windows_of(path, model.window_seconds, model.config.data.frame_choice))
    sides = {"audio_embedding": found.audio, "video_embedding": found.video}
    vectors = {name: vector.numpy() for name, vector in sides.items() if vector is not None}
    start, end = window.seconds
    return Subject(Path(path).name, f"shown: {start:.1f} to {end:.1f} s", window, vectors)


def build_page(page: Page, tabs: Sequence[tuple[str, Any]]) -> gr.Blocks:
    """Build the page.

    Args:
        page: what its tabs share.
        tabs: name of each, and the function that builds its components, given `page`.
    """
    with gr.Blocks(title="cavmae explore", analytics_enabled=False) as blocks:
        page.subject = gr.State(None)
        status = gr.Textbox(page.status, label="State", container=False, interactive=False)
        with gr.Row():
            with gr.Column():
                _build_choice(page, status)
            with gr.Column():
                view = ClipView(None)
                page.subject.change(view.values, page.subject, view.outputs)
        for name, build in tabs:
            with gr.Tab(name) as tab:
                build(page, tab)
        # It never ends: Gradio would lose an event that is sent while the stream of answers closes,
        # as it does when nothing is under way (gradio#13599).
        blocks.load(
            partial(_status, page), outputs=status, show_progress="hidden", concurrency_limit=None
        )
    return blocks


async def _status(page: Page) -> AsyncIterator[Any]:
    """Say what the command is doing, whenever it changes."""
    told = ""
    while True:
        now = page.status
        yield gr.skip() if now == told else now
        told = now
        await asyncio.sleep(0.5)


def _build_choice(page: Page, status: gr.Textbox) -> None:
    """Build the ways to choose what is looked at."""
    file = gr.File(label="A sound, a picture or a video", type="filepath", height=120)
    with gr.Accordion("Record", open=False):
        recorded = [
            gr.Audio(label="Sound", sources=["microphone"], type="filepath"),
            gr.Image(label="Picture", sources=["webcam"], type="filepath", format="png"),
            gr.Video(
                label="Clip",
                sources=["webcam"],
                include_audio=True,  # otherwise, and to mirror it, Gradio runs ffmpeg
                webcam_options=gr.WebcamOptions(mirror=False),
            ),
        ]
    with gr.Row():
        wanted = gr.Textbox(label="Id of a clip", scale=3)
        drawn = gr.Button("Any clip", scale=1)

    def look(path: str | None) -> tuple[Any, Any]:
        if not path:
            return gr.skip(), gr.skip()
        try:
            return subject_of_file(page, path), page.status
        except (ValueError, OSError) as error:
            return gr.skip(), shown(str(error).replace(path, Path(path).name))

    def look_at_clip(sample_id: str) -> tuple[Any, Any]:
        try:
            return page.collection.subject(page.collection.row_of(sample_id.strip())), page.status
        except ValueError as error:
            return gr.skip(), shown(str(error))

    file.upload(look, file, [page.subject, status])
    recorded[0].stop_recording(look, recorded[0], [page.subject, status])
    recorded[1].input(look, recorded[1], [page.subject, status])
    recorded[2].stop_recording(look, recorded[2], [page.subject, status])
    wanted.submit(look_at_clip, wanted, [page.subject, status])
    drawn.click(
        lambda: page.collection.subject(random.randrange(len(page.collection))),
        outputs=page.subject,
    )
