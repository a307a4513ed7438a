"""*Mistakes*: clips that are found worst, and classes for which others are found."""

import threading
from typing import TYPE_CHECKING, Any

import gradio as gr

from cavmae.trainer.explore.page import ClipView, Page, shown
from cavmae.trainer.explore.tab_find import card

if TYPE_CHECKING:
    from cavmae.trainer.metrics.retrieval import Ranking

SIDES = ("audio_embedding", "video_embedding")
DIRECTIONS = {
    "pictures, by their sound": ("audio_to_video", *SIDES),
    "sounds, by their picture": ("video_to_audio", *reversed(SIDES)),
}
"""Direction, and columns of what is searched with and of what is found."""
WORST, CONFUSED, EXAMPLES = 24, 20, 12
NOTE = (
    "Every clip searches for its own other half among all clips. A class is taken for another if "
    "what is found first has none of the labels of the clip; clips without labels don't count."
)


def build(page: Page, tab: gr.Tab) -> None:
    """Build the tab."""
    gr.Textbox(NOTE, label="Note", container=False, interactive=False, lines=2)
    with gr.Row():
        direction = gr.Radio([*DIRECTIONS], value=next(iter(DIRECTIONS)), label="Find")
        start = gr.Button("Find mistakes", variant="primary")
    kinds = gr.Radio([], label="Mistakes", type="index")
    gallery = gr.Gallery(
        label="Clips",
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        elem_classes="found mistakes",
    )
    with gr.Row():
        with gr.Column():
            gr.Textbox("The clip", label="Left", container=False, interactive=False)
            ours = ClipView(page)
        with gr.Column():
            gr.Textbox("What it finds first", label="Right", container=False, interactive=False)
            theirs = ClipView(page)
    mistakes, pairs = gr.State([]), gr.State([])
    rankings: dict[str, Ranking] = {}
    lock = threading.Lock()

    def ranked(name: str, progress: gr.Progress) -> "Ranking":
        from cavmae.trainer.explore.mistakes import kept_rankings

        def report(done: int, total: int) -> None:
            progress((done, total), desc="ranking, once", unit="clips")

        with lock:
            if not rankings:
                path = page.collection.embeddings.beside("rankings.npy")
                audio, video = (page.collection.vectors[one] for one in SIDES)
                rankings.update(kept_rankings(audio, video, path, report))
            return rankings[name]

    def find(
        chosen: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio looks for this default
    ) -> tuple[gr.Radio, list[Any]]:
        import torch

        from cavmae.trainer.explore.mistakes import most_confused, worst_retrievals

        name, *columns = DIRECTIONS[chosen]
        try:
            ranking = ranked(name, progress)
        except (ValueError, OSError) as error:
            return gr.Radio([shown(str(error))], value=None), []
        labels = page.collection.table["labels"].to_pylist()
        queries, candidates = (torch.from_numpy(page.collection.vectors[one]) for one in columns)
        worst = worst_retrievals(queries, candidates, ranking, count=WORST, found=1)
        confused = most_confused(labels, ranking, count=CONFUSED, examples=EXAMPLES)
        titles = [f"the {len(worst)} clips that are found last"]
        found = [[(one.row, one.found[0][0], f"place {one.place:g}") for one in worst]]
        for one in confused:
            titles.append(shown(f"{one.label}: {one.clips:.3g} of {one.queries} find {one.found}"))
            found.append([(row, other, one.found) for row, other in one.rows])
        return gr.Radio(titles, value=titles[0]), found

    def show(number: int | None, found: list[Any], chosen: str) -> tuple[list[Any], list[Any]]:
        if number is None or not found:
            return [], []
        column = DIRECTIONS[chosen][1]
        cards = [card(page, row, caption, column) for row, _, caption in found[number]]
        return cards, found[number]

    def open_pair(pairs: list[Any], event: gr.SelectData) -> list[Any]:
        row, other, _ = pairs[event.index]
        return [
            *ours.values(page.collection.subject(row)),
            *theirs.values(page.collection.subject(other)),
        ]

    start.click(find, direction, [kinds, mistakes], show_progress="full")
    gr.on([kinds.change, mistakes.change], show, [kinds, mistakes, direction], [gallery, pairs])
    direction.change(lambda: (gr.Radio([], value=None), []), outputs=[kinds, mistakes])
    gallery.select(open_pair, pairs, [*ours.outputs, *theirs.outputs])
