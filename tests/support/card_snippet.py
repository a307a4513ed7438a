"""The code that a model card gives its readers, run."""

import re
from pathlib import Path
from typing import Any


def run_snippet(folder: Path, picture: str = "") -> dict[str, Any]:
    """The names that the code of the card in `folder`, the current one, leaves.

    Args:
        folder: what `from_pretrained` loads.
        picture: file to take in place of the one that the card makes up.
    """
    (snippet,) = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL
    )
    assert 'Image.new("RGB", (340, 256))' in snippet
    if picture:
        snippet = snippet.replace('Image.new("RGB", (340, 256))', f"Image.open({picture!r})")
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names
