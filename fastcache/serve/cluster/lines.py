"""A file of prompts, one a line, or of JSON objects -> rows to draw, each with one of several bundles.

Knows files and the fields of rows; draws nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastcache.expect import first_problem
from fastcache.files import read_lines
from fastcache.serve.cluster.rows import PICTURES, Row, Shown, seed_of
from fastcache.serve.models.listed import Listed
from fastcache.serve.models.quality import OWN_SETTINGS, PLAN_NAMES, PlanFolder, Plans, plans_for, read_offered


@dataclass(frozen=True)
class Model:
    """A bundle that rows may be drawn with, at the same path on every machine, and the plans fitted for it."""

    engines: Path
    plans: Plans


def models_of(offered: Sequence[Listed], folders: Sequence[PlanFolder] = ()) -> dict[str, Model]:
    """Bundles by their names, the first the one of rows that name none, each with the plans fitted for it.

    Raises: as `read_offered`.
    """
    manifests = read_offered(offered, folders)
    return {
        name: Model(one.engines.resolve(), plans_for(folders, manifest))
        for (name, manifest), one in zip(manifests.items(), offered, strict=True)
    }


def read_rows(path: Path, seed: int, defaults: dict[str, Any], models: Mapping[str, Model]) -> list[Row]:
    """The rows of a file: of `.jsonl` one JSON object a line, with the fields of `Row`; of any other one prompt a line.

    A row without an id has its line's number, six digits from 000001; without a seed that of `seed_of`; without a
    model the first of `models`. Its pictures are files from the folder of `path` on, and a `quality` stands for one of
    its model's plans.

    Raises: `ValueError` naming the line.
    """
    rows: dict[str, Row] = {}
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            given = _fields(line, path.suffix == ".jsonl")
            _find_pictures(given, path.parent)
            name = given.setdefault("model", next(iter(models)))
            if name not in list(models):  # be it no text
                raise ValueError(f"model: expected one of {', '.join(models)}, got {name!r}; give its --engines, too")
            row = _row(_with_plan(given, models[name].plans), number, seed, defaults)
        except ValidationError as error:
            raise ValueError(f"{path}, line {number}: {first_problem(error, 'the row')}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if row.id in rows:
            raise ValueError(f"{path}, line {number}: expected ids that differ, got {row.id} again")
        rows[row.id] = row
    if not rows:
        raise ValueError(f"expected a file of prompts, one a line, got {path} without any")
    return list(rows.values())


def _fields(line: str, is_json: bool) -> dict[str, Any]:
    if not is_json:
        return {"prompt": line.strip()}
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {type(found).__name__}")
    return found


def _find_pictures(given: dict[str, Any], folder: Path) -> None:
    """Put in place of a picture's path what it names. Raises: `ValueError`."""
    for name in PICTURES.keys() & given.keys():
        if not isinstance(given[name], str):
            raise ValueError(f"{name}: expected the path of a picture, from the rows' file on, got {given[name]!r}")
        given[name] = Shown.of(folder / given[name])


def _with_plan(given: dict[str, Any], plans: Plans) -> dict[str, Any]:
    """The plan that a row's quality stands for. Raises: `ValueError` for none, or beside what the plan says itself."""
    if "quality" not in given:
        return given
    left = {name: value for name, value in given.items() if name != "quality"}
    quality = given["quality"]
    if quality not in list(plans):
        known = f"a quality of {', '.join(PLAN_NAMES)}, with --plans for {given['model']}"
        raise ValueError(f"quality: expected {known}, got {quality!r}{'' if plans else ' and no plans'}")
    if own := [name for name in OWN_SETTINGS if name in given]:
        raise ValueError(f"quality: expected it without {own[0]}, which its plan says itself; leave one out")
    return {**dict.fromkeys(OWN_SETTINGS), **left, "plan": json.loads(plans[quality].to_json())}


def _row(given: dict[str, Any], number: int, seed: int, defaults: dict[str, Any]) -> Row:
    # A row's own interval takes the place of the job's plan, and the other way round.
    other = {"cache_interval": "plan", "plan": "cache_interval"}
    replaced = {other[name] for name in other.keys() & given.keys()}
    kept = {name: value for name, value in defaults.items() if name not in replaced}
    fields = {"id": f"{number:06d}", **kept, **given}
    if "seed" not in fields:
        fields["seed"] = seed_of(str(fields["id"]), seed)
    return Row.model_validate(fields)
