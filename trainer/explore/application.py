"""The tabs of the page, as an application."""

from typing import Any

import gradio as gr
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
