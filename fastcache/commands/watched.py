"""A run's steps as they are taken -> how far the drawing is, on a terminal, and with --watch a picture on its way."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fastcache.console import notes
from fastcache.files import write_whole

if TYPE_CHECKING:
    from fastcache.loop.steps import Run, Step
    from fastcache.pipeline.pipeline import FastCachePipeline, Watch

_SHARE: Final = 0.1  # of the time, for previews


def preview_path(output: Path, is_file: bool) -> Path:
    """Where the picture on its way lies: beside the file that is drawn, or in the folder.

    Raises: `ValueError` for a file that is there, for it would be gone at the end.
    """
    path = output.with_suffix(".preview.png") if is_file else output / "preview.png"
    if path.exists():
        raise ValueError(f"expected no file {path}, where --watch shows the picture on its way, got one; move it")
    return path


@contextmanager
def watching(batches: int | None, preview: Path | None) -> Generator[Watch | None]:
    """What is called after each step; None where nobody looks. The preview is gone at the end.

    `batches` is how many runs there will be, if that is known.
    """
    from rich.progress import Progress

    if preview is None and not notes.is_terminal:
        yield None
        return
    own = None if preview is None else _Preview(preview)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task("drawing", total=None)

        def watch(pipe: FastCachePipeline, run: Run, step: Step) -> None:
            bar.update(task, advance=1, total=batches and batches * pipe.num_timesteps)
            if own is not None:
                own.show(pipe, run, step)

        try:
            yield watch
        finally:
            if own is not None:
                own.path.unlink(missing_ok=True)


class _Preview:
    """The first picture of a run on its way, in a file that is renewed as often as that takes a tenth of the time."""

    def __init__(self, path: Path) -> None:
        self.path, self._next, self._told = path, 0.0, False

    def show(self, pipe: FastCachePipeline, run: Run, step: Step) -> None:
        from fastcache.pipeline.provenance import png_bytes

        start = time.monotonic()
        if start < self._next:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, png_bytes(pipe.preview(run, step.index), {}))
        if not self._told:
            notes.print(f"the picture on its way: {self.path}", markup=False, soft_wrap=True)
            self._told = True
        end = time.monotonic()
        self._next = end + (end - start) * (1 - _SHARE) / _SHARE
