"""Pages in one file: nothing is loaded from elsewhere, which the page itself forbids, and what a
text holds stays text."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from cavmae.text_table import in_utf8

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 14px; }}
th, td {{ border: 1px solid #ccc; padding: 0.25em 0.6em; text-align: left; vertical-align: top; }}
th {{ background: #f2f2f2; }}
td, pre {{ overflow-wrap: anywhere; white-space: pre-wrap; }}
img {{ max-width: 100%; }}
h2 {{ border-top: 2px solid #444; padding-top: 0.6em; margin-top: 2em; }}
figure {{ display: inline-block; margin: 0.5em; vertical-align: top; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, body: str) -> str:
    """Put HTML into a page; the title is text."""
    return in_utf8(_PAGE.format(title=escape(title), body=body))


def element(tag: str, text: object) -> str:
    """Make an element that holds a text."""
    return f"<{tag}>{escape(str(text))}</{tag}>"


def grid(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Make a table of texts; an empty header: none."""
    lines = ["".join(element("th", one) for one in header)] if header else []
    lines += ["".join(element("td", one) for one in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(data: bytes, name: str, kind: str = "png") -> str:
    """Embed a picture of a type such as png, jpeg, svg+xml under its name."""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img src="{source}" alt="{escape(name)}">'
