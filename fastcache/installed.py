"""This package's folder -> whether it is this project's alone. Knows nothing of what the project does.

Another project is called `fastcache` on the package index (a C implementation of `lru_cache`). Installed beside this
one it writes into the same folder, and each overwrites the other's `__init__.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fastcache_engines.extras import DISTRIBUTION

_THEIRS: Final = "_lrucache*"  # the other project's compiled module, which this one has nothing like


def require_alone(folder: Path = Path(__file__).parent) -> None:
    """Raises: `ImportError` with what to do, where the other project's files lie in this package's folder."""
    if any(folder.glob(_THEIRS)):
        raise ImportError(
            f"expected {DISTRIBUTION} alone in {folder}, got the files of the other project called fastcache "
            f"(a C lru_cache) beside it; run: pip uninstall -y fastcache {DISTRIBUTION}, "
            f"then: pip install {DISTRIBUTION}"
        )
