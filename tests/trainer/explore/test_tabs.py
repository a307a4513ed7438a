"""*Where*, *Fill in* and *Mistakes* in a browser: Debian's Chromium, driven by Playwright."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_run import save_untrained

pytest.importorskip("gradio", reason="needs the extra explore")
pytest.importorskip("playwright", reason="needs playwright")

from playwright.sync_api import Browser, Page, expect, sync_playwright

expect.set_options(timeout=30_000)
CHROMIUM = shutil.which("chromium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH"),
]

HOSTILE = ("<img src=x onerror=alert(1)>", "**bold** [link](http://evil.example)")


@pytest.fixture(scope="module")
def address(packed_synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page on a run and 12 clips, whose labels are markup."""
    from cavmae.dataloaders.packing.pack import PackConfig, pack
    from cavmae.trainer.explore import page as page_module
    from cavmae.trainer.explore.application import application
    from cavmae.trainer.explore.command import ExploreConfig, fill
    from cavmae.trainer.explore.server import listening_socket, serving

    folder = tmp_path_factory.mktemp("tabs")
    videos = sorted((packed_synthetic.parent / "videos").glob("*.mp4"))[:12]
    rows = [f'{video},"{HOSTILE[number % 2]}"' for number, video in enumerate(videos)]
    (folder / "clips.csv").write_text("\n".join(["path,labels", *rows]) + "\n")
    shards = folder / "shards"
    pack(PackConfig(str(folder / "clips.csv"), str(shards), tiers="frames", workers=1))
    save_untrained(packed_synthetic, folder / "run")
    page = page_module.Page()
    with listening_socket(0) as listening, serving(application(page), listening, "token"):
        fill(page, ExploreConfig(str(folder / "run"), str(shards / "frames")))
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/?token=token"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[1280, 390], ids=["screen", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Page]:
    """The page with a clip that is looked at; it asks nobody else, and has no errors."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    page = context.new_page()
    wrong: list[str] = []
    own = re.compile(r"http://127\.0\.0\.1:|blob:http://127\.0\.0\.1:|data:")
    context.on("request", lambda one: None if own.match(one.url) else wrong.append(one.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(address)
    page.get_by_label("Id of a clip").fill("000000/000000003")
    page.get_by_label("Id of a clip").press("Enter")
    facts = page.get_by_label("Clip", exact=True).first
    expect(facts).to_have_value(re.compile("^000000/000000003\n"))
    yield page
    context.close()
    assert wrong == []


def test_a_click_shows_which_patches_of_the_other_side_go_with_a_place(
    page: Page,
) -> None:
    page.get_by_role("tab", name="Where").click()
    told, pictures = page.get_by_label("Values"), page.locator(".where img")
    expect(told).to_have_value(re.compile("sound and picture: cosine"))
    expect(pictures).to_have_count(2)
    # Of 3 x 3 patches those that there are: the picture has 2 x 2, the sound 2 x 12.
    for number, (name, patches) in enumerate([("picture", 4), ("sound", 6)]):
        pictures.nth(number).evaluate("picture => picture.decode()")
        box = pictures.nth(number).bounding_box()
        assert box is not None
        pictures.nth(number).click(position={"x": box["width"] / 4, "y": box["height"] * 3 / 4})
        found = re.compile(rf"^with {patches} patches of the {name}: .*0\.\d+ to .*0\.\d+")
        expect(told).to_have_value(found)
        expect(pictures).to_have_count(2)
    page.get_by_role("button", name="Choose without a mouse").click()
    page.get_by_role("button", name="Choose in the picture").click()
    expect(told).to_have_value(re.compile("^with 4 patches of the picture"))


def test_a_clip_is_filled_in_to_be_seen_and_heard(page: Page) -> None:
    page.get_by_role("tab", name="Fill in").click()
    told = page.get_by_label("Errors of what was filled in")
    page.get_by_label("the picture, from the sound").check()
    expect(page.get_by_label("spans of time")).to_be_disabled()
    page.get_by_role("button", name="Fill in").click()
    expect(told).to_have_value(re.compile("^video: mean squared error"))
    expect(page.locator(".filled img")).to_have_count(6)
    expect(page.get_by_role("button", name="Play", exact=True)).to_have_count(3)
    page.get_by_label("patches of both").check()
    page.get_by_label("number input for Share of the sound that is removed").fill("0")
    page.get_by_label("number input for Share of the picture that is removed").fill("0")
    page.get_by_role("button", name="Fill in").click()
    expect(told).to_have_value(re.compile("which removes none of 28; change one"))


def test_mistakes_are_listed_with_what_was_found_and_labels_are_text(
    page: Page,
) -> None:
    page.get_by_role("tab", name="Mistakes").click()
    page.get_by_role("button", name="Find mistakes").click()
    clips = page.locator(".mistakes .thumbnail-item")
    expect(clips.first).to_contain_text("place")
    facts = page.get_by_label("Clip", exact=True).filter(visible=True)
    clips.first.click()
    expect(facts.nth(2)).to_have_value(re.compile("^000000/"))
    before = facts.nth(1).input_value()
    assert before in [facts.nth(1).input_value(), ""] and before != facts.nth(2).input_value()
    confused = page.get_by_role("radio", name=re.compile(" find "))
    assert confused.count() > 0
    hostile = page.get_by_role("radio", name=re.compile("^" + re.escape(HOSTILE[0])))
    expect(hostile).to_have_count(1)
    confused.first.check()
    expect(clips.first).not_to_contain_text("place")
    clips.first.click()  # the same number as before: gradio#5748
    expect(facts.nth(1)).not_to_have_value(before)
    page.get_by_label("sounds, by their picture").check()
    expect(confused).to_have_count(0)
