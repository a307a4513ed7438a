"""*Where*: which patches of the picture and which of the sound go with each other."""

from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from cavmae.trainer.explore.page import Page, shown

if TYPE_CHECKING:
    import torch

    from cavmae.trainer.explore.collection import Subject
    from cavmae.trainer.explore.where import Scene, Side

NOTE = (
    "The value of a patch is the cosine of its token with the mean of the other side's tokens: of "
    "all of them, or of those that a click chooses there. Colours go from the lowest value, dark, "
    "to the highest, yellow. The model was trained to match whole clips and not to show where: a "
    "patch has seen all others, and one of a high value need not be what sounds."
)
SIZES = {"one patch": 1, "3 x 3 patches": 3, "5 x 5 patches": 5}
SIDES = ("video", "audio")
"""In the order in which they are shown."""


def build(page: Page, tab: gr.Tab) -> None:
    """Build the tab."""
    gr.Textbox(NOTE, label="Note", container=False, interactive=False, lines=3)
    with gr.Row():
        whole = gr.Button("Whole sound and picture")
        size = gr.Radio([*SIZES], value="3 x 3 patches", label="A click chooses")
        keep = gr.Checkbox(label="Keep this sound, and compare it with other pictures")
    with gr.Row():
        pictures = [
            gr.Image(
                label=label,
                interactive=False,
                format="png",
                buttons=[],
                min_width=300,
                elem_classes="where",
            )
            for label in ("Picture", "Sound: spectrogram, low frequencies at the bottom")
        ]
    told = gr.Textbox(label="Values", interactive=False, lines=2)
    with gr.Accordion("Choose without a mouse", open=False), gr.Row():
        across = gr.Slider(0, 100, 50, step=1, label="Percent from the left")
        down = gr.Slider(0, 100, 50, step=1, label="Percent from the top")
        buttons = [gr.Button(f"Choose in the {name}") for name in ("picture", "spectrogram")]
    scene, kept = gr.State(None), gr.State(None)
    outputs = [*pictures, told]

    def show(subject: "Subject | None", heard: "Subject | None") -> list[Any]:
        from cavmae.trainer.explore.where import look

        if subject is None:
            return [None, None, None, ""]
        try:
            seen, sound = subject.window, (heard or subject).window
            if seen is None or sound is None:
                raise ValueError("no media at hand")
            with page.model() as model:
                made = look(model, sound, seen)
        except ValueError as error:
            return [None, None, None, shown(str(error))]
        values = [made.video.cosines(made.audio.mean()), made.audio.cosines(made.video.mean())]
        painted = [made.video.painted(values[0]), made.audio.painted(values[1])]
        return [
            made,
            *painted,
            f"sound and picture: cosine {made.cosine:.3f}\n"
            f"of patches of the picture {_range(values[0])}; of the sound {_range(values[1])}, "
            f"highest {_stretch(made, values[1])}",
        ]

    def choose(made: "Scene", size: str, x: float, y: float, name: str) -> list[Any]:
        if made is None:
            return [gr.skip()] * len(outputs)
        other = SIDES[1 - SIDES.index(name)]
        side: Side = getattr(made, name)
        try:
            chosen = side.around(x, y, SIZES[size])
        except ValueError as error:
            return [gr.skip(), gr.skip(), shown(str(error))]
        values = getattr(made, other).cosines(side.mean(chosen))
        drawn = {name: side.outlined(chosen), other: getattr(made, other).painted(values)}
        words = f"with {int(chosen.sum())} patches of the {_NAMES[name]}: {_range(values)}"
        if other == "audio":
            words += f", highest {_stretch(made, values)}"
        return [*(drawn[one] for one in SIDES), words]

    def clicked_in(name: str) -> Any:
        # Gradio finds the event by its annotation, which `partial` would hide.
        def click(made: Any, size: str, event: gr.SelectData) -> list[Any]:
            if made is None or None in event.index:
                return [gr.skip()] * len(outputs)
            width, height = getattr(made, name).shown.size
            across, down = event.index
            return choose(made, size, (across + 0.5) / width, (down + 0.5) / height, name)

        return click

    def choose_by_slider(
        made: "Scene", size: str, across: float, down: float, name: str
    ) -> list[Any]:
        return choose(made, size, min(across / 100, 0.999), min(down / 100, 0.999), name)

    keep.change(
        lambda on, subject: subject if on else None,
        [keep, page.subject],
        kept,
    )
    gr.on(
        [page.subject.change, kept.change, whole.click],
        show,
        [page.subject, kept],
        [scene, *outputs],
    )
    for name, picture, button in zip(SIDES, pictures, buttons, strict=True):
        picture.select(clicked_in(name), [scene, size], outputs)
        inputs = [scene, size, across, down]
        button.click(partial(choose_by_slider, name=name), inputs, outputs)


_NAMES = {"video": "picture", "audio": "sound"}


def _range(values: "torch.Tensor") -> str:
    known = values[~values.isnan()]
    return f"{known.min():.3f} to {known.max():.3f}"


def _stretch(scene: "Scene", values: "torch.Tensor") -> str:
    start, end = scene.best_stretch(values)
    return f"from {start:.2f} to {end:.2f} s"
