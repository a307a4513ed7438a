"""*Map*: places are computed once, what is drawn is what a click finds, and labels are text."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs the extra explore")

from cavmae.trainer.embeddings import projection as projection_module
from cavmae.trainer.embeddings.projection import projection
from cavmae.trainer.explore.tab_map import COLOURS, PIXELS, Region, draw, grouped, moved


def clusters(points: int = 120) -> np.ndarray:
    """Three far groups, (points, 16) float32; a point's group is its number modulo 3."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 16))
    return (centres[np.arange(points) % 3] + 0.05 * random.normal(size=(points, 16))).astype("f4")


def test_near_embeddings_lie_near_each_other(tmp_path: Path) -> None:
    done: list[float] = []
    places = projection(clusters(), tmp_path / "index" / "plane.npy", done.append)
    centres = np.stack([places[first::3].mean(0) for first in range(3)])
    distances = np.linalg.norm(places[:, None] - centres, axis=2)
    assert (distances.argmin(1) == np.arange(len(places)) % 3).all()
    assert np.abs(places).max() == pytest.approx(1)
    assert done == sorted(done) and len(done) > 10 and done[-1] == 1


def test_a_projection_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plane.npy"
    first = projection(clusters(12), path, lambda done: None)
    monkeypatch.delattr(projection_module, "_computed")
    assert (projection(clusters(12), path, lambda done: None) == first).all()
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"plane.npy is damaged .*remove it"):
        projection(clusters(12), path, lambda done: None)


@pytest.mark.field  # zeno#361
@pytest.mark.parametrize("points", [1, 2, 9, 10, 11, 29, 31])
def test_few_clips_have_places_of_their_own(tmp_path: Path, points: int) -> None:
    places = projection(clusters(points), tmp_path / "p.npy", lambda done: None)
    assert len(np.unique(places, axis=0)) == points and np.isfinite(places).all()


@pytest.mark.field  # dify#2581
@pytest.mark.parametrize("points", [1, 2, 9, 40])
def test_clips_that_are_all_equal_have_places(tmp_path: Path, points: int) -> None:
    places = projection(np.ones((points, 4), np.float32), tmp_path / "p.npy", lambda done: None)
    assert places.shape == (points, 2) and np.isfinite(places).all()


@pytest.mark.parametrize("region", [Region(), Region(0.3, -0.2, 0.01)])
def test_the_pixel_of_a_place_is_the_place_of_that_pixel(region: Region) -> None:
    places = np.array([[region.x, region.y], [region.x + region.half, region.y - region.half]])
    pixels = region.pixels(places)
    assert pixels[1].tolist() == [PIXELS - 1, PIXELS - 1]
    assert [region.place(one) for one in pixels] == pytest.approx(
        places, abs=region.half / PIXELS * 2
    )


def test_a_point_is_drawn_where_a_click_finds_it() -> None:
    places, colours = np.array([[0.5, 0.5], [-0.5, 0.1]]), np.array([[255, 0, 0], [0, 0, 255]])
    drawn = draw(places, colours.astype(np.uint8), Region(), chosen=1)
    x, y = Region().pixels(places)[0]
    assert drawn[y, x].tolist() == [255, 0, 0] and x > PIXELS / 2 > y
    assert (drawn == 0).all(2).any()  # the ring
    away = draw(places, colours.astype(np.uint8), Region(5, 5, 0.1), chosen=0)
    assert (away == 255).all()


def test_zooming_in_goes_to_the_chosen_point_and_moves_keep_the_scale() -> None:
    near = moved(Region(), "Zoom in", (0.4, 0.6))
    assert (near.x, near.y, near.half) == (0.4, 0.6, Region().half / 2)
    right = moved(near, "Right", None)
    assert right.x > near.x and (right.y, right.half) == (near.y, near.half)
    assert moved(right, "Up", None).y > right.y
    assert moved(right, "Zoom out", None).half == Region().half
    assert moved(right, "Whole", None) == Region()


def test_rare_names_share_a_colour_and_counts_add_up() -> None:
    names = [f"class {number}" for number in range(30) for _ in range(31 - number)] + ["", ""]
    numbers, titles = grouped(names)
    assert titles[0] == "class 0 (31)" and titles[-1].startswith("others (")
    assert sum(int(title.rpartition("(")[2][:-1]) for title in titles) == len(names)
    assert len(np.unique(COLOURS, axis=0)) == len(titles) == numbers.max() + 1 == len(COLOURS)
    assert grouped(["", "a", "a"])[1] == ["a (2)", "no label (1)"]
