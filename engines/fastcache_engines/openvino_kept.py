"""What OpenVINO compiled for one process -> the same for the next: kept (`compiled.py`), noted, and imported ahead.

Importing a graph takes a second or more, and no Python. Another second of a process's start goes into importing torch.
So `begin` imports in a thread what the last process used, and nothing here needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np

from fastcache_engines import compiled
from fastcache_engines.extras import install
from fastcache_engines.machine import BackendUnavailable

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # by the inputs' names
Key = tuple[str, ...]

_TELEMETRY: Final = "openvino_telemetry"


class Compiled(NamedTuple):
    """A compiled graph, and the file in memory that it may read its weights from as long as it is used."""

    graph: Any
    content: Any = None


_begun: dict[Key, Future[Compiled | None]] = {}


def openvino() -> Any:
    """The package. Raises: `BackendUnavailable` where it is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise BackendUnavailable(f"OpenVINO is not installed; run: {install('openvino')}")
    modules: dict[str, Any] = sys.modules
    if "openvino" not in modules:
        # It takes this for not installed, and so tells nobody of being imported, for which it would fork this process.
        modules.setdefault(_TELEMETRY, None)
    import openvino

    if modules.get(_TELEMETRY, openvino) is None:
        modules.pop(_TELEMETRY, None)
    return openvino


def begin(identities: Iterable[str]) -> None:
    """Begin to import, one after another, what was noted under these names; nothing where there is none.

    Who then asks for another graph under such a name compiles or imports that one, and what was begun is let go.
    """
    noted = {identity: found for identity in identities if (found := compiled.kept(_note_of(identity))) is not None}
    if not noted or importlib.util.find_spec("openvino") is None:
        return
    openvino()  # here: two threads that import are one too many
    pool = ThreadPoolExecutor(1, "fastcache-import")
    for identity, content in noted.items():
        shapes, settings = json.loads(bytes(content))
        key = _key(identity, tuple((name, tuple(shape)) for name, shape in shapes), settings)
        if key not in _begun:
            _begun[key] = pool.submit(_import, key, settings)
    pool.shutdown(wait=False)


def let_go(identities: Iterable[str]) -> None:
    """Drop what was begun under these names and not asked for."""
    unwanted = {*identities}
    for key in [key for key in list(_begun) if key[3] in unwanted]:
        if (begun := _begun.pop(key, None)) is not None:
            begun.cancel()


def note(identity: str, shapes: Shapes, settings: Mapping[str, Any]) -> None:
    """Say what was used under a name, for `begin` in the next process."""
    content = json.dumps([shapes, settings]).encode()
    before = compiled.kept(_note_of(identity))
    if before is None or bytes(before) != content:
        compiled.keep(_note_of(identity), content)


def imported(identity: str, shapes: Shapes, settings: Mapping[str, Any]) -> Compiled | None:
    """The graph that this or another process compiled for these shapes, if it was kept."""
    key = _key(identity, shapes, settings)
    begun = _begun.pop(key, None)
    let_go([identity])
    return _import(key, settings) if begun is None or begun.cancel() else begun.result()


def keep(identity: str, shapes: Shapes, settings: Mapping[str, Any], graph: Any) -> None:
    """Keep a compiled graph for other processes."""
    compiled.keep(_key(identity, shapes, settings), graph.export_model().getvalue())


def _import(key: Key, settings: Mapping[str, Any]) -> Compiled | None:
    blob = compiled.kept(key)
    if blob is None:
        return None
    content = np.frombuffer(blob, np.uint8)
    try:
        graph = openvino().Core().import_model(openvino().Tensor(content, shared_memory=True), "CPU", dict(settings))
    except RuntimeError:
        compiled.drop(key)
        return None
    return Compiled(graph, content)


def _key(identity: str, shapes: Shapes, settings: Mapping[str, Any]) -> Key:
    """Whatever decides what OpenVINO makes of the graph."""
    found = openvino().get_version()
    return "openvino", found, compiled.processor(), identity, repr(shapes), repr(dict(settings))


def _note_of(identity: str) -> Key:
    return "openvino", "used first", identity  # another content needs another name
