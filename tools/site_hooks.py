"""What mkdocs does to pages of docs/: README is the first one, and links out of the folder become the files' names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page as the site has it."""
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        inside = ""
    else:
        inside = "../"
    return _LINK.sub(lambda link: _within(link, inside), markdown)


def _within(link: re.Match[str], outside: str) -> str:
    """A link that stays in the site as it is; one to another file of the repository as its name."""
    picture, text, target = link.groups()
    if picture or "://" in target or target.startswith("#"):
        return link[0]
    path = target.partition("#")[0]
    if outside and not path.startswith(outside):
        return link[0]
    name = path.removeprefix(outside)
    if not outside and (ROOT / "docs" / name).exists():
        return link[0]
    return f"{text} (`{name}`)"
