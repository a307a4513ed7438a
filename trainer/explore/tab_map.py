"""*Map*: all clips in a plane, near where their embeddings are near.

The map is drawn here and sent as a picture, so that 100,000 points cost a browser, or a phone, no
more than ten. A click finds the nearest point; buttons do all that clicks do, for keyboards.
"""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import gradio as gr
import matplotlib
import numpy as np
from scipy.spatial import KDTree

from cavmae.console import shortened
from cavmae.trainer.embeddings.projection import projection
from cavmae.trainer.explore.page import ClipView, Page, shown

PIXELS = 720
"""Height and width of the map."""
_TAB20 = matplotlib.colormaps["tab20"](np.arange(20))[[*range(0, 20, 2), *range(1, 20, 2)], :3]
COLOURS = (np.vstack([np.delete(_TAB20, (7, 17), 0), (0.8, 0.8, 0.8)]) * 255).astype(np.uint8)
"""Of the most common labels, or sources, and grey for all others, (groups + 1, 3)."""
GROUPS = len(COLOURS) - 1
DRAWN_SHARE = 0.02
"""Of the map's pixels, which points may cover at most before they are drawn smaller."""
SMALLEST, LARGEST = 1, 5
"""Radius of a point in pixels."""
ZOOM, PAN = 2.0, 0.5
TITLE_WIDTH = 60
MODALITIES = {"Sounds": "audio_embedding", "Pictures": "video_embedding"}
ColourBy = Literal["Label", "Source", "Folder"]


@dataclass(frozen=True)
class Region:
    """The part of the plane that the map shows: a square, by its centre and half its side."""

    x: float = 0.0
    y: float = 0.0
    half: float = 1.05

    def pixels(self, places: np.ndarray) -> np.ndarray:
        """Convert places (points, 2) to pixels, x to the right and y downwards, (points, 2)."""
        shifted = (places - (self.x, self.y)) / self.half  # -1 to 1
        return np.rint((shifted * (1, -1) + 1) / 2 * (PIXELS - 1)).astype(int)

    def place(self, pixel: Sequence[float]) -> tuple[float, float]:
        """Convert a pixel to a place."""
        right, down = (2 * one / (PIXELS - 1) - 1 for one in pixel)
        return self.x + right * self.half, self.y - down * self.half


def grouped(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Number the most common names, as `COLOURS`: (points,) int; and title each number that there
    is with its name and count, in order."""
    common = Counter(names).most_common(GROUPS)
    numbers = {name: number for number, (name, _) in enumerate(common)}
    found = np.array([numbers.get(name, GROUPS) for name in names])
    titles = [f"{name or 'no label'} ({count})" for name, count in common]
    others = int((found == GROUPS).sum())
    return found, titles + [f"others ({others})"] * (others > 0)


def draw(places: np.ndarray, colours: np.ndarray, region: Region, chosen: int | None) -> np.ndarray:
    """Draw points (points, 2) in their colours, (points, 3) uint8, and a ring around one: (PIXELS,
    PIXELS, 3) uint8."""
    canvas = np.full((PIXELS, PIXELS, 3), 255, np.uint8)
    pixels = region.pixels(places)
    inside = np.flatnonzero(((pixels >= 0) & (pixels < PIXELS)).all(1))
    inside = np.random.default_rng(0).permutation(inside)  # no group lies on top of all others
    room = DRAWN_SHARE * PIXELS**2 / max(1, len(inside))
    radius = int(np.clip(np.sqrt(room), SMALLEST, LARGEST))
    disc = np.argwhere(np.ones((2 * radius + 1,) * 2)) - radius
    for offset in disc[(disc**2).sum(1) <= radius**2]:
        _paint(canvas, pixels[inside] + offset, colours[inside])
    if chosen is not None:
        angle = np.linspace(0, 2 * np.pi, 200)
        for size in (11, 12, 13):
            ring = pixels[chosen] + size * np.stack([np.cos(angle), np.sin(angle)], 1)
            _paint(canvas, np.rint(ring).astype(int), np.zeros((len(ring), 3), np.uint8))
    return canvas


def _paint(canvas: np.ndarray, pixels: np.ndarray, colours: np.ndarray) -> None:
    on = ((pixels >= 0) & (pixels < PIXELS)).all(1)
    canvas[pixels[on, 1], pixels[on, 0]] = colours[on]


def moved(region: Region, move: str, chosen: tuple[float, float] | None) -> Region:
    """Return the region after a move, one of `MOVES`; zooming in goes to the chosen point."""
    if move == "Whole":
        return Region()
    if move == "Zoom out":
        return replace(region, half=region.half * ZOOM)
    if move == "Zoom in":
        x, y = chosen or (region.x, region.y)
        return Region(x, y, region.half / ZOOM)
    right, up = MOVES[move]
    return replace(
        region, x=region.x + right * region.half * PAN, y=region.y + up * region.half * PAN
    )


MOVES = {
    "Zoom in": (0, 0),
    "Zoom out": (0, 0),
    "Whole": (0, 0),
    "Left": (-1, 0),
    "Right": (1, 0),
    "Up": (0, 1),
    "Down": (0, -1),
}


def build(page: Page, tab: gr.Tab) -> None:
    """Build the tab."""
    region, chosen = gr.State(Region()), gr.State(None)
    with gr.Row():
        modality = gr.Radio([*MODALITIES], value="Sounds", label="Embeddings of")
        by = gr.Radio([*get_args(ColourBy)], value="Label", label="Colours by")
    picture = gr.Image(
        label="Map", format="png", interactive=False, buttons=["fullscreen"], elem_classes="map"
    )
    with gr.Row():
        buttons = {name: gr.Button(name, min_width=80, size="sm") for name in MOVES}
        centre = gr.Button("Clip at the centre", min_width=160, size="sm")
    legend = gr.HighlightedText(label="Colours", show_inline_category=False, buttons=[])
    view = ClipView(page)

    groups = cache(lambda by: grouped(_names(page, by)))
    trees: dict[str, KDTree] = {}
    lock = threading.Lock()

    def tree_of(modality: str, progress: gr.Progress) -> KDTree:
        column = MODALITIES[modality]
        with lock:
            if column not in trees:
                path = page.collection.embeddings.beside(f"{column}.plane.npy")
                vectors = page.collection.vectors[column]
                trees[column] = KDTree(
                    projection(vectors, path, partial(progress, desc="projecting, once"))
                )
            return trees[column]

    def show(
        modality: str,
        by: ColourBy,
        region: Region,
        row: int | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  Gradio looks for this default
    ) -> tuple[np.ndarray, gr.HighlightedText]:
        places = tree_of(modality, progress).data
        numbers, titles = groups(by)
        titles = [shortened(shown(title), TITLE_WIDTH) for title in titles]
        colours = {
            title: f"#{bytes(colour).hex()}" for title, colour in zip(titles, COLOURS, strict=False)
        }
        legend = gr.HighlightedText([(title, title) for title in titles], color_map=colours)
        return draw(places, COLOURS[numbers], region, row), legend

    def choose(modality: str, region: Region, event: gr.SelectData) -> list[Any]:
        return at(modality, region.place(event.index))

    def choose_centre(modality: str, region: Region) -> list[Any]:
        return at(modality, (region.x, region.y))

    def at(modality: str, place: tuple[float, float]) -> list[Any]:
        row = int(tree_of(modality, gr.Progress()).query(place)[1])
        return [row, *view.values(page.collection.subject(row))]

    def move(modality: str, region: Region, row: int | None, name: str) -> Region:
        point = None if row is None else tuple(tree_of(modality, gr.Progress()).data[row])
        return moved(region, name, point)

    inputs = [modality, by, region, chosen]
    gr.on(
        [tab.select, modality.change, by.change, region.change, chosen.change],
        show,
        inputs,
        [picture, legend],
        show_progress="full",
    )
    picture.select(choose, [modality, region], [chosen, *view.outputs])
    centre.click(choose_centre, [modality, region], [chosen, *view.outputs])
    for name, button in buttons.items():
        button.click(partial(move, name=name), [modality, region, chosen], region)


def _names(page: Page, by: ColourBy) -> list[str]:
    """Return what each clip is coloured by."""
    collection = page.collection
    if by == "Label":
        return [(labels or [""])[0] for labels in collection.table["labels"].to_pylist()]
    sources = collection.table["source_path"].to_pylist()
    return sources if by == "Source" else [str(Path(one).parent) for one in sources]
