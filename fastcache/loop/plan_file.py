"""A cache plan -> the JSON document of its file, and back. Reads what earlier versions wrote.

Knows keys and types; whether a plan makes sense is `CachePlan`'s own business.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, Final, cast

from fastcache.cut.names import FULL, shallow_pass
from fastcache.expect import expected, is_int, shown
from fastcache.loop.adjustment import ScaleShift
from fastcache.loop.fit import Fit
from fastcache.loop.plan import CachePlan, Forecast

SCHEMA: Final = "fastcache.plan/2"

_SCHEMA_1: Final = "fastcache.plan/1"  # had `branches` in place of `passes`: null for FULL, else the branch_id
_KEYS: Final = {"schema", "model", "sampler", "made_by", "num_steps", "passes"}
_OPTIONAL_KEYS: Final = {"unguided_steps", "forecast", "fit", "scale_shift"}
_FIT_OPTIONAL_KEYS: Final = {"contrasts"}
_FIT_KEYS: Final = {field.name for field in fields(Fit)} - _FIT_OPTIONAL_KEYS
_REMEDY: Final = "write plans with CachePlan.to_json"


def written(plan: CachePlan) -> str:
    """The document, in one line; what a plan does not have is left out."""
    document: dict[str, object] = {
        "schema": SCHEMA,
        "model": plan.model,
        "sampler": plan.sampler,
        "made_by": plan.made_by,
        "num_steps": plan.num_steps,
        "passes": plan.passes,
    }
    if plan.unguided_steps:
        document["unguided_steps"] = plan.unguided_steps
    if plan.forecast is not None:
        document["forecast"] = asdict(plan.forecast)
    if plan.fit is not None:
        left_out = () if plan.fit.contrasts else _FIT_OPTIONAL_KEYS
        document["fit"] = {name: value for name, value in asdict(plan.fit).items() if name not in left_out}
    if plan.scale_shift is not None:
        document["scale_shift"] = plan.scale_shift.to_json()
    return json.dumps(document)


def read(text: str) -> CachePlan:
    """The plan in a document.

    Raises: ValueError, in one line, if the text is not JSON, of another schema, or not a valid plan.
    """
    document = _read_document(text)
    passes, unguided_steps = document["passes"], document.get("unguided_steps", [])
    for name, value in (("passes", passes), ("unguided_steps", unguided_steps)):
        if not isinstance(value, list):
            raise expected(f"{name} to be a list", value, _REMEDY)
    if not is_int(document["num_steps"]) or document["num_steps"] != len(cast("list[object]", passes)):
        raise expected(f"num_steps {len(cast('list[object]', passes))}, one a pass", document["num_steps"], _REMEDY)
    return CachePlan(  # __post_init__ checks the types
        tuple(cast("list[str]", passes)),
        cast("str | None", document["model"]),
        cast("str | None", document["sampler"]),
        cast(str, document["made_by"]),
        tuple(cast("list[int]", unguided_steps)),
        _read_forecast(document.get("forecast")),
        _read_fit(document.get("fit")),
        None if document.get("scale_shift") is None else ScaleShift.from_json(document["scale_shift"]),
    )


def _read_document(text: str) -> dict[str, object]:
    """The keys and values of a plan's document, those of an earlier schema made into this one's."""
    try:
        parsed = cast(object, json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"expected a plan as JSON, got {shown(text)} ({error}); {_REMEDY}") from error
    if not isinstance(parsed, dict):
        raise expected("a JSON object", parsed, _REMEDY)
    found = cast("dict[str, object]", parsed)
    if found.get("schema") == _SCHEMA_1 and isinstance(found.get("branches"), list):
        branches = cast("list[object]", found.pop("branches"))
        found |= {"schema": SCHEMA, "passes": [_pass_of(step, branch) for step, branch in enumerate(branches)]}
    if found.get("schema") != SCHEMA:
        raise expected(f'schema "{SCHEMA}"', found.get("schema"), "make the plan again with this fastcache")
    if not _KEYS <= found.keys() <= _KEYS | _OPTIONAL_KEYS:
        raise ValueError(
            f"expected the keys {sorted(_KEYS)}, or {sorted(_OPTIONAL_KEYS)} besides, got "
            f"{shown(sorted(found))}; {_REMEDY}"
        )
    return found


def _pass_of(step: int, branch: object) -> str:
    if branch is None:
        return FULL
    if not is_int(branch) or branch < 0:
        raise expected(f"branches[{step}] to be null or an integer >= 0", branch, "null is a FULL step")
    return shallow_pass(branch)


def _read_forecast(value: object) -> Forecast | None:
    if value is None:
        return None
    found = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if found.keys() != {"order", "damping", "by"}:
        raise expected("forecast to have the keys order, damping and by", cast(object, value), _REMEDY)
    return Forecast(**found)


def _read_fit(value: object) -> Fit | None:
    if value is None:
        return None
    found = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    if not _FIT_KEYS <= found.keys() <= _FIT_KEYS | _FIT_OPTIONAL_KEYS:
        raise expected(f"fit to have the keys {sorted(_FIT_KEYS)}", cast(object, value), _REMEDY)
    lists: dict[str, Any] = {}
    for name in ("points", "rows", *(_FIT_OPTIONAL_KEYS & found.keys())):
        if not isinstance(found[name], list):
            raise expected(f"{name} to be a list in a fit", found[name], _REMEDY)
        # What is no list among the rows is no number either, and so refused.
        lists[name] = tuple(tuple(cast("list[float]", row)) if isinstance(row, list) else (row,) for row in found[name])
    lists["points"] = tuple(found["points"])
    return Fit(**{**found, **lists})
