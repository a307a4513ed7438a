"""What the site has beside the pages of `docs`: pages made from the code, README and the other
pages of the repository's top folder, and every file that a page links to. MkDocs calls it.

The pages are written for the repository, where all their links lead somewhere; here they are turned
to where the site has the same thing.
"""

import os
import re
from pathlib import Path, PurePosixPath

from commands_page import commands_page
from fields_page import fields_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

TOP_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
"""Pages of the top folder, and where the site has them."""

_TARGET = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)")
"""Where a link of Markdown leads to inside the repository, without the anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in `docs`."""
    texts = {name: (ROOT / name).read_text() for name in TOP_PAGES}
    for name, place in TOP_PAGES.items():
        files.append(File.generated(config, place, content=_turned(texts[name], ROOT)))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    files.append(File.generated(config, "reference/fields.md", content=fields_page()))
    for path in sorted(Path(config.docs_dir).rglob("*.md")):
        for target in _TARGET.findall(path.read_text()):
            place = _place(target, path.parent)
            if place.startswith("repository/") and files.get_file_from_path(place) is None:
                source = str((path.parent / target).resolve())
                files.append(File.generated(config, place, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a page of `docs`."""
    if page.file.generated_by:
        return markdown
    return _turned(markdown, Path(config.docs_dir, page.file.src_uri).parent)


def _turned(markdown: str, folder: Path) -> str:
    """The links of a page in `folder`, as the site has them: relative to the page."""
    start = folder.relative_to(ROOT / "docs") if folder != ROOT else Path()
    return _TARGET.sub(lambda found: os.path.relpath(_place(found[1], folder), start), markdown)


def _place(target: str, folder: Path) -> str:
    """Where the site has what a page in `folder` links to."""
    path = PurePosixPath((folder / target).resolve().relative_to(ROOT))
    if path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    return TOP_PAGES.get(str(path)) or f"repository/{path}"
