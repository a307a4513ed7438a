"""The tabs of the page, as an application."""

from typing import Any, NoReturn

import gradio as gr
import safehttpx
from fastapi import FastAPI
from gradio.themes import Default

from cavmae.trainer.explore import tab_fill_in, tab_find, tab_map, tab_mistakes, tab_where
from cavmae.trainer.explore.page import CSS, Page, build_page

TABS = (
    ("Find", tab_find.build),
    ("Where", tab_where.build),
    ("Fill in", tab_fill_in.build),
    ("Map", tab_map.build),
    ("Mistakes", tab_mistakes.build),
)
LARGEST_FILE = "2gb"
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
"""Gradio's own theme asks other hosts for fonts."""


async def _refused(url: str, **_: object) -> NoReturn:
    raise ValueError(f"{url} is not fetched; give a file")


safehttpx.get = safehttpx.async_validate_url = _refused
"""What Gradio fetches URLs with that a request to the page holds; it asks a public resolver too."""


def application(page: Page) -> FastAPI:
    """Build the page and what serves it."""
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(page, TABS),
        path="/",
        theme=Default(**FONTS),
        css=CSS,
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
    )
