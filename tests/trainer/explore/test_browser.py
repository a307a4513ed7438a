"""The page in a real Chromium: by keyboard, on a phone, with hostile names, and no request beyond
this machine."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_run import save_untrained

from cavmae import cli

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest.importorskip("gradio", reason="needs the extra explore")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium"),
]
HOSTILE = "<img src=//elsewhere.invalid onerror=document.title=1>"


WIDTHS = pytest.mark.parametrize("shown", [1280, 390], indirect=True, ids=["desktop", "phone"])


@dataclass
class Shown:
    """A page in the browser, and every request that it attempted."""

    page: "Page"
    requests: list[str]

    def beyond(self) -> list[str]:
        schemes = ("blob", "data")
        return [
            one
            for one in self.requests
            if urlsplit(one).scheme not in schemes and urlsplit(one).hostname != "127.0.0.1"
        ]


def with_hostile_names(folder: Path) -> None:
    """Give the clips of embeddings labels, sources and ids that are HTML."""
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        names = [f"{one}{HOSTILE}" for one in table["sample_id"].to_pylist()]
        changed = {
            "labels": pa.array([[HOSTILE, one[:8]] for one in names], pa.list_(pa.string())),
            "sample_id": pa.array(names),
            "source_path": pa.array(names),
        }
        for name, column in changed.items():
            place = table.schema.get_field_index(name)
            table = table.set_column(place, table.schema.field(name), column)
        pq.write_table(table, path)


@pytest.fixture(scope="module")
def address(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of a run, as the command serves it."""
    folder = tmp_path_factory.mktemp("browser")
    save_untrained(packed_synthetic, folder / "run")
    shards, out = str(packed_synthetic / "frames"), folder / "embeddings"
    assert cli.main(["embed", str(folder / "run"), shards, f"--out={out}"]) == 0
    with_hostile_names(out)
    command = [sys.executable, "-m", "cavmae", "explore", "--embeddings", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().removeprefix("open ").strip()
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    # Names of other hosts have no address here, so what Chromium itself would ask for fails.
    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=options)


@pytest.fixture
def shown(browser: "Browser", address: str, request: pytest.FixtureRequest) -> Iterator[Shown]:
    context = browser.new_context(viewport={"width": request.param, "height": 844})
    requests: list[str] = []
    context.on("request", lambda one: requests.append(one.url))
    page = context.new_page()
    # A request that the page's policy forbids is an attempt too.
    page.expose_function("forbidden", lambda url: requests.append(url))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', event => forbidden(event.blockedURI))"
    )
    page.set_default_timeout(20_000)
    page.goto(address)
    page.get_by_role("button", name="Any clip").wait_for()
    yield Shown(page, requests)
    context.close()


@WIDTHS
def test_a_clip_is_found_chosen_and_searched_on_by_keyboard_alone(shown: Shown) -> None:
    page = shown.page
    page.get_by_role("button", name="Any clip").press("Enter")
    results = page.locator(".found .thumbnail-item")
    results.nth(23).wait_for()
    chosen = page.get_by_label("Clip", exact=True).nth(1)
    results.nth(1).press("Enter")
    playwright.expect(chosen).not_to_have_value("")
    name = chosen.input_value().split("\n")[0]
    page.get_by_role("button", name="Look at this clip").first.press("Enter")
    playwright.expect(page.get_by_label("Clip", exact=True).first).to_have_value(
        chosen.input_value()
    )
    assert HOSTILE in name and page.title() == "cavmae explore"
    assert page.locator("img[onerror], img[src*=elsewhere]").count() == 0
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
    assert len(shown.requests) > 20 and shown.beyond() == []


@WIDTHS
def test_the_map_shows_the_clip_of_a_point(shown: Shown) -> None:
    page = shown.page
    page.get_by_role("tab", name="Map").press("Enter")
    page.locator(".map img").wait_for()
    chosen = page.get_by_label("Clip", exact=True).locator("visible=true").last
    page.get_by_role("button", name="Clip at the centre").press("Enter")
    playwright.expect(chosen).not_to_have_value("")
    near_centre = chosen.input_value()
    plane = page.locator(".map img")
    box = plane.bounding_box()
    assert box is not None
    right, bottom = box["width"] - 5, box["height"] - 5  # a button is at the top right
    near_corners = set()
    for x, y in ((5, 5), (5, bottom), (right, bottom)):
        plane.click(position={"x": x, "y": y})
        page.wait_for_timeout(1000)
        near_corners.add(chosen.input_value())
    assert near_corners - {near_centre, ""}
    playwright.expect(page.get_by_text(f"{HOSTILE} (24)").first).to_be_visible()
    assert page.title() == "cavmae explore" and shown.beyond() == []


@pytest.mark.parametrize("shown", [390], indirect=True)
def test_a_file_that_is_dropped_is_looked_at_or_named_as_text(
    shown: Shown, packed_synthetic: Path, tmp_path: Path
) -> None:
    page = shown.page
    bad = tmp_path / "a<b>.wav"
    bad.write_bytes(b"<svg onload=alert(1)>")
    page.locator("input[type=file]").first.set_input_files(bad)
    status = page.get_by_label("State")
    playwright.expect(status).to_have_value(re.compile(r"^a.*b.*\.wav can't be used \(open_failed"))
    page.get_by_role("button", name="Clear").click()
    video = packed_synthetic.parent / "videos" / "000009.mp4"
    page.locator("input[type=file]").first.set_input_files(video)
    clip = page.get_by_label("Clip", exact=True).first
    playwright.expect(clip).to_have_value(re.compile(r"^000009\.mp4\nshown: 0\.0 to [12]\.\d s$"))
    caption = page.locator(".found .caption-label").first
    playwright.expect(caption).to_contain_text("0000")
    assert shown.beyond() == []
