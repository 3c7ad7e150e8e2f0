"""What the project is called on the package index, and the command that installs one of its extras."""

from __future__ import annotations

from typing import Final

# `fastcache` there is another author's project, which owns the same folder of site-packages.
DISTRIBUTION: Final = "fastcache-diffusion"


def install(extra: str) -> str:
    """The command for an extra of pyproject.toml, for messages that say what to do."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
