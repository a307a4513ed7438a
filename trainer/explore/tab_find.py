"""*Find*: what goes with the sound and with the picture that are looked at."""

from typing import Any

import gradio as gr
import numpy as np

from cavmae.console import shortened
from cavmae.trainer.explore.page import ClipView, Page, shown

TOP = 12
SIDES = {
    "audio_embedding": ("video_embedding", "Pictures that go with its sound"),
    "video_embedding": ("audio_embedding", "Sounds that go with its picture"),
}
"""Column of what is looked at; column and name of what is found across modalities."""
WITHIN = {
    "audio_embedding": "Sounds like its sound",
    "video_embedding": "Pictures like its picture",
}
ACROSS = "between sound and picture"
ITSELF = " (this clip)"
GREY, WIDTH = 225, 60
"""Where there is no media; characters of an id, or of labels."""


def build(page: Page, tab: gr.Tab) -> None:
    """Build the tab."""
    way = gr.Radio([ACROSS, "within each"], value=ACROSS, label="Compare")
    galleries, rows = [], []
    with gr.Row():
        for _, name in SIDES.values():
            with gr.Column(min_width=320):
                rows.append(gr.State([]))
                galleries.append(
                    gr.Gallery(
                        label=name,
                        columns=4,
                        height="auto",
                        object_fit="contain",
                        allow_preview=False,
                        buttons=[],
                        elem_classes="found",
                    )
                )
    view = ClipView(page)

    def search(subject: Any, compared: str) -> list[Any]:
        found: list[Any] = []
        for column, (other, name) in SIDES.items():
            if compared != ACROSS:
                other, name = column, WITHIN[column]
            ranked, own = [], None
            if subject is not None and column in subject.vectors:
                ranked, own = (
                    page.collection.nearest(other, subject.vectors[column], TOP),
                    subject.row,
                )
            cards = [
                card(page, row, f"{score:.3f}{ITSELF * (row == own)}", other)
                for row, score in ranked
            ]
            found += [gr.Gallery(cards, label=name), [row for row, _ in ranked]]
        return found

    outputs = [part for pair in zip(galleries, rows, strict=True) for part in pair]
    gr.on([page.subject.change, way.change], search, [page.subject, way], outputs)

    def choose(found: list[int], event: gr.SelectData) -> list[Any]:
        return view.values(page.collection.subject(found[event.index]))

    for gallery, listed in zip(galleries, rows, strict=True):
        gallery.select(choose, listed, view.outputs)


def card(page: Page, row: int, heading: str, column: str) -> tuple[np.ndarray, str]:
    """Draw the frame of a clip, or its sound if that is the column's, over a heading, its id and
    its labels."""
    from cavmae.trainer.explore.collection import spectrogram

    subject = page.collection.subject(row)
    picture = None
    if subject.window is not None:
        picture, sound = subject.window.frame, subject.window.audio
        if column == "audio_embedding" and sound is not None:
            picture = spectrogram(sound)
    if picture is None:
        picture = np.full((64, 64, 3), GREY, np.uint8)
    labels = ", ".join(page.collection.clip(row)["labels"])
    lines = [shortened(shown(one), WIDTH) for one in (heading, subject.name, labels)]
    return picture, "\n".join(lines)
