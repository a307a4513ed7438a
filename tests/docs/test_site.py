"""The site builds without a warning, and has what the pages link to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_every_page_of_the_folder_is_in_the_site(site: Path) -> None:
    docs = ROOT / "docs"
    pages = {path.relative_to(docs).with_suffix("") for path in docs.rglob("*.md")}
    assert [page for page in sorted(pages) if not (site / page / "index.html").is_file()] == []


@pytest.mark.slow
def test_the_site_has_the_pages_made_from_the_code(site: Path) -> None:
    assert "--clips-per-shard" in (site / "reference/commands/index.html").read_text()
    assert "optimizer.learning_rate" in (site / "reference/fields/index.html").read_text()


@pytest.mark.slow
def test_an_option_stays_whole_at_the_end_of_a_line(site: Path) -> None:
    page = (site / "reference/commands/index.html").read_text()
    assert '<span class="option">--clips-per-shard</span> INT' in page
    assert ".option {" in (site / "site.css").read_text()


@pytest.mark.slow
def test_a_file_that_a_page_links_to_is_in_the_site(site: Path) -> None:
    assert (site / "repository" / "Dockerfile").read_bytes() == (ROOT / "Dockerfile").read_bytes()
    assert (
        'href="../../repository/Dockerfile"' in (site / "training/clusters/index.html").read_text()
    )


@pytest.mark.slow
def test_the_readme_is_the_first_page_and_its_links_stay_in_the_site(site: Path) -> None:
    assert 'href="start/install/"' in (site / "index.html").read_text()


@pytest.mark.slow
def test_the_site_asks_no_other_host_for_files(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in ("<script", "<link"):
            for rest in page.read_text().split(tag)[1:]:
                assert "http" not in rest.partition(">")[0], page
