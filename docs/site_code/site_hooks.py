"""MkDocs hooks: add pages generated from the code, README and the other pages of the top folder,
and every file that a page links to.

Pages are written with links to files of the repository; here the links are rewritten for the site.
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
"""Pages of the top folder, and their paths in the site."""

_TARGET = re.compile(r"(?<=\]\()(?!https?:|#)([^)#]+)")
"""Target of a Markdown link to a file of the repository, without the anchor."""

_OPTION = re.compile(r"(?<=[\s>])--[a-z][\w.-]*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and files that are not in `docs`."""
    texts = {name: (ROOT / name).read_text() for name in TOP_PAGES}
    for name, place in TOP_PAGES.items():
        files.append(File.generated(config, place, content=_rewritten(texts[name], ROOT)))
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
    """Rewrite the links of a page of `docs`."""
    if page.file.generated_by:
        return markdown
    return _rewritten(markdown, Path(config.docs_dir, page.file.src_uri).parent)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep options whole: a browser would begin a line between the hyphens and the name."""
    return _OPTION.sub(r'<span class="option">\g<0></span>', html)


def _rewritten(markdown: str, folder: Path) -> str:
    """Rewrite the links of a page in `folder` for the site, relative to the page."""
    start = folder.relative_to(ROOT / "docs") if folder != ROOT else Path()
    return _TARGET.sub(lambda found: os.path.relpath(_place(found[1], folder), start), markdown)


def _place(target: str, folder: Path) -> str:
    """Return the path in the site of a file that a page in `folder` links to."""
    path = PurePosixPath((folder / target).resolve().relative_to(ROOT))
    if path.parts[0] == "docs":
        return str(path.relative_to("docs"))
    return TOP_PAGES.get(str(path)) or f"repository/{path}"
