"""The code that a model card gives its readers, run."""

import re
from pathlib import Path
from typing import Any


def run_snippet(folder: Path, image: str = "") -> dict[str, Any]:
    """Run the code of the card in `folder`, the current folder; returns its variables.

    Args:
        folder: what `from_pretrained` loads.
        image: file to use in place of the blank image of the card.
    """
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL
    )
    assert 'Image.new("RGB", (340, 256))' in snippet
    if image:
        snippet = snippet.replace('Image.new("RGB", (340, 256))', f"Image.open({image!r})")
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names
