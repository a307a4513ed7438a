"""*Fill in*: patches are removed, and the model says what was there."""

from typing import TYPE_CHECKING, Any

import gradio as gr

from cavmae.trainer.explore.page import Page, shown

if TYPE_CHECKING:
    from cavmae.trainer.explore.collection import Subject

DIRECTIONS = {
    "patches of both": "joint",
    "the picture, from the sound": "audio-to-video",
    "the sound, from the picture": "video-to-audio",
}
MODES = {
    "random patches": "unstructured",
    "spans of time": "time",
    "frequency bands": "freq",
    "time and frequency": "tf",
}
NOTE = (
    "The sounds are made from spectrograms, which do not say all that is heard, so both are "
    "approximate: the first one, of which nothing was removed, tells how much comes from that."
)
GIVEN = (
    "Brightness and contrast of each removed patch, and loudness in the sound, are taken from the "
    "original: this model predicts patches without them."
)


def build(page: Page, tab: gr.Tab) -> None:
    """Build the tab."""
    gr.Textbox(NOTE, label="Note", container=False, interactive=False, lines=2)
    with gr.Row():
        direction = gr.Radio([*DIRECTIONS], value="patches of both", label="Fill in")
        mode = gr.Radio([*MODES], value="random patches", label="Remove from the sound")
    with gr.Row():
        ratios = [
            gr.Slider(0, 1, 0.75, step=0.05, label=f"Share of the {name} that is removed")
            for name in ("sound", "picture")
        ]
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        start = gr.Button("Fill in", variant="primary")
    told = gr.Textbox(label="Errors of what was filled in", interactive=False, lines=3)
    pictures = []
    for kind in ("Picture", "Spectrogram"):
        with gr.Row():
            pictures += [
                gr.Image(
                    label=label,
                    interactive=False,
                    format="png",
                    buttons=[],
                    min_width=200,
                    elem_classes="filled",
                )
                for label in (kind, "What is kept", "Filled in")
            ]
    with gr.Row():
        sounds = [
            gr.Audio(label=f"Sound, {name}", interactive=False, buttons=[], min_width=240)
            for name in ("nothing removed", "filled in")
        ]

    def fill(
        subject: "Subject | None",
        direction: str,
        mode: str,
        audio_ratio: float,
        video_ratio: float,
        seed: float,
    ) -> list[Any]:
        from cavmae.trainer.evaluation.reconstruct import errors_in_words
        from cavmae.trainer.explore.fill_in import fill_in

        joint = DIRECTIONS[direction] == "joint"
        try:
            if subject is None or subject.window is None:
                raise ValueError("choose a clip or a file with sound and picture first")
            with page.model() as model:
                made = fill_in(
                    model,
                    subject.window,
                    direction=DIRECTIONS[direction],  # pyright: ignore[reportArgumentType]
                    audio_ratio=audio_ratio if joint else None,
                    video_ratio=video_ratio if joint else None,
                    audio_mode=MODES[mode],  # pyright: ignore[reportArgumentType]
                    seed=int(seed or 0),
                )
        except ValueError as error:
            return [shown(str(error)), *empty]
        words = [*errors_in_words(made.errors), *([GIVEN] if made.given else [])]
        drawn = [*made.frames.values(), *made.spectrograms.values()]
        return ["\n".join(words), *drawn, *made.sounds.values()]

    empty = [None] * len([*pictures, *sounds])
    outputs = [told, *pictures, *sounds]
    start.click(fill, [page.subject, direction, mode, *ratios, seed], outputs)
    page.subject.change(lambda: ["", *empty], outputs=outputs)
    direction.change(
        lambda name: [gr.update(interactive=DIRECTIONS[name] == "joint")] * 3,
        direction,
        [mode, *ratios],
    )
