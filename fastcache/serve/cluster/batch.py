"""A file of prompts and bundles -> a folder of pictures, drawn by workers of Ray Data on one machine or on many.

A row's picture is one file, written whole, that says what it was drawn from: a row whose file stands is done, so a job
that was killed is started again and draws what is left. Knows files and Ray; `rows.py` knows how rows are drawn.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from PIL import Image as Pillow

from fastcache.bundle.bundle import open_bundle
from fastcache.bundle.manifest import Manifest
from fastcache.errors import BackendUnavailable
from fastcache.files import write_whole
from fastcache.pipeline.pipeline import FastCachePipeline
from fastcache.pipeline.provenance import png_bytes
from fastcache.serve.cluster.lines import Model
from fastcache.serve.cluster.rows import Row, draw_rows
from fastcache_engines.extras import install

INDEX: Final = "index.jsonl"
_DIGEST: Final = "row_sha256"
_OBJECT_STORE_BYTES: Final = 200 * 2**20  # rows are text: Ray's own choice, 30% of the memory, is for tables


@dataclass(frozen=True)
class Cluster:
    """Where to draw: `address` of a running cluster, or None for workers of this machine that end with the job.

    `cpus` and `gpus` are each worker's; None for this machine's cores shared out (one on a cluster), and for a GPU if
    the bundle needs one.
    """

    workers: int = 1
    cpus: int | None = None
    gpus: float | None = None
    address: str | None = None


@dataclass(frozen=True)
class Report:
    """A job's end: how many rows were drawn now, how many stood already, and the entries of the index."""

    drawn: int
    skipped: int
    entries: Sequence[dict[str, Any]]

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if "error" in entry]


def draw_file(
    models: Mapping[str, Model],
    rows: Sequence[Row],
    output: Path,
    cluster: Cluster | None = None,
    *,
    say: Callable[[str], None] = lambda message: None,
) -> Report:
    """Draw the rows that have no picture in `output` yet, then write the index of all.

    Raises: `BackendUnavailable` without Ray; `BundleError`; `ValueError` for a folder with other rows' pictures.
    """
    cluster = cluster or Cluster()
    output, used = output.resolve(), {row.model for row in rows}
    engines = {name: model.engines for name, model in models.items() if name in used}
    manifests = {name: open_bundle(folder).manifest for name, folder in engines.items()}
    output.mkdir(parents=True, exist_ok=True)
    left = [row for row in rows if not _is_done(output, row, manifests[row.model].bundle_sha256)]
    skipped, errors = len(rows) - len(left), dict[str, str]()
    say(f"{len(rows)} rows, {skipped} of them drawn before")
    if left:
        with _ray(cluster):
            for done, result in enumerate(_results(engines, left, output, manifests.values(), cluster), 1):
                if result["error"]:
                    errors[result["id"]] = result["error"]
                say(f"{done} of {len(left)}: {result['id']}{' failed' if result['error'] else ''}")
    entries = [_entry(row, errors.get(row.id)) for row in rows]
    write_whole(output / INDEX, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    return Report(len(left) - len(errors), skipped, entries)


def _entry(row: Row, error: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": row.id, "file": f"{row.id}.png", "seed": row.seed, "prompt": row.prompt}
    entry["model"] = row.model
    return entry if error is None else {**entry, "file": None, "error": error}


def _is_done(output: Path, row: Row, bundle_sha256: str) -> bool:
    """Whether a row's picture stands. Raises: `ValueError` if it is another's: of other words, settings or engines."""
    file = output / f"{row.id}.png"
    if not file.exists():
        return False
    try:
        with Pillow.open(file) as picture:
            found = picture.info.get(_DIGEST)
    except OSError as error:
        raise ValueError(f"expected the picture of row {row.id} in {file}, got: {error}; remove it") from None
    if found != row.digest(bundle_sha256):
        raise ValueError(
            f"expected {file} to be drawn from this row, settings and bundle, got a picture of others; "
            "write to another folder, or remove it"
        )
    return True


class Artist:
    """A worker: draws batches of rows, and writes each picture whole.

    It holds one bundle at a time, and keeps it until a row of another comes: rows of a model come one after the other.
    """

    def __init__(self, engines: dict[str, str], output: str) -> None:
        self._engines, self._output = engines, Path(output)
        self._pipe = lru_cache(maxsize=1)(self._load)

    def _load(self, model: str) -> FastCachePipeline:
        self._pipe.cache_clear()  # before the next is loaded, not after
        return FastCachePipeline(open_bundle(self._engines[model]))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Ray Data's batch of rows as JSON -> their ids, and errors (empty for none)."""
        rows, results = [Row.model_validate_json(text) for text in batch["row"]], dict[str, str]()
        for model, own in itertools.groupby(sorted(rows, key=_alike), key=lambda row: row.model):
            results |= self._draw(self._pipe(model), list(own))
        return {"id": list(results), "error": list(results.values())}

    def _draw(self, pipe: FastCachePipeline, rows: Sequence[Row]) -> dict[str, str]:
        bundle_sha256 = pipe.bundle.manifest.bundle_sha256
        # Ray gives the batch of a worker that died to another; what it had drawn stands.
        results = {row.id: "" for row in rows if _is_done(self._output, row, bundle_sha256)}
        for outcome in draw_rows(pipe, [row for row in rows if row.id not in results]):
            row = outcome.row
            if outcome.picture is not None:
                made = outcome.made | {"row_id": row.id, _DIGEST: row.digest(bundle_sha256)}
                write_whole(self._output / f"{row.id}.png", png_bytes(outcome.picture, made))
            results[row.id] = outcome.error or ""
        return results


def _alike(row: Row) -> tuple[str, str]:
    """Neighbours in this order share a bundle, and a batch."""
    return row.model, row.settings


def _results(
    engines: Mapping[str, Path], rows: Sequence[Row], output: Path, manifests: Collection[Manifest], cluster: Cluster
) -> Iterator[dict[str, Any]]:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # No more at once than leaves something for every worker.
    largest = min(manifest.profiles["batch"].max for manifest in manifests)
    most = max(1, min(largest, -(-len(rows) // cluster.workers)))
    alike = sorted(rows, key=_alike)
    # As many blocks as batches: a block is what a worker takes at a time, and what is drawn again if it dies.
    table = ray.data.from_items(
        [{"row": row.model_dump_json()} for row in alike], override_num_blocks=max(1, -(-len(alike) // most))
    )
    needs_gpu = any(manifest.device_type == "cuda" for manifest in manifests)
    gpus = cluster.gpus if cluster.gpus is not None else float(needs_gpu)
    drawn = table.map_batches(
        Artist,
        fn_constructor_kwargs={
            "engines": {name: str(folder) for name, folder in engines.items()},
            "output": str(output),
        },
        batch_size=most,
        # One at a time, or the worker that is there first takes what the others would have drawn.
        compute=ray.data.ActorPoolStrategy(size=cluster.workers, max_tasks_in_flight_per_actor=1),
        num_cpus=_cpus(cluster),
        num_gpus=gpus or None,
    )
    yield from drawn.iter_rows()


def _cpus(cluster: Cluster) -> int:
    """A worker's cores; Ray sets OMP_NUM_THREADS to them."""
    if cluster.cpus is not None:
        return cluster.cpus
    return 1 if cluster.address else max(1, (os.cpu_count() or 1) // cluster.workers)


@contextmanager
def _ray(cluster: Cluster) -> Generator[None]:
    """Ray for the time of a job. Raises: `BackendUnavailable`."""
    # What Ray would say of itself on stderr: how to log in, that its bars are off, and of an actor's arguments, which
    # stay where they are until the job is over (ray#53727). Set the variable to see what its C++ says.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        import ray
        import ray.data  # pyright: ignore[reportUnusedImport] (needs packages of its own)
    except ImportError as error:
        raise BackendUnavailable(
            f"expected Ray to draw a file of prompts, got none ({error.name}); run: {install('ray')}"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address:
        try:
            ray.init(cluster.address, **common)
        except ConnectionError as error:
            raise BackendUnavailable(f"expected a Ray cluster at {cluster.address}, got: {error}") from error
    else:
        # One more than the workers take, so that whatever else Ray Data runs never waits for them.
        ray.init(
            "local",
            num_cpus=cluster.workers * _cpus(cluster) + 1,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()
