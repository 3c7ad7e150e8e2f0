"""Folders of fitted plans -> the qualities that a model is offered in. Knows plan files and manifests.

`fastcache plan --frontier DIR` writes such a folder: draft.json, standard.json and fine.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fastcache.bundle.bundle import read_manifest
from fastcache.bundle.manifest import Manifest
from fastcache.loop.plan import CachePlan
from fastcache.serve.http.schema import PlanUsed, QualityOffered
from fastcache.serve.models.listed import Listed, require_different

Quality = Literal["low", "medium", "high"]
PLAN_NAMES: Final[Mapping[Quality, str]] = {"low": "draft", "medium": "standard", "high": "fine"}
BEST_FIRST: Final[tuple[Quality, ...]] = ("high", "medium", "low")
OWN_SETTINGS: Final = ("plan", "cache_interval", "num_inference_steps", "sampler")  # which such a plan says itself
_MOST_BYTES: Final = 4 * 2**20  # a fitted plan of 50 steps takes 10 kB

Plans = Mapping[Quality, CachePlan]


@dataclass(frozen=True)
class PlanFolder:
    """The plans in a folder, all fitted for the same weights."""

    folder: Path
    plans: Plans
    weights_sha256: str


def read_plans(folder: Path) -> PlanFolder:
    """Raises: `ValueError` that names the file that is missing, no plan, not fitted, or fitted for other weights."""
    plans: dict[Quality, CachePlan] = {}
    weights = dict[str, str]()
    for quality, name in PLAN_NAMES.items():
        file = folder / f"{name}.json"
        try:
            if file.stat().st_size > _MOST_BYTES:
                raise ValueError(f"expected a plan of at most {_MOST_BYTES} bytes, got more")
            plan = CachePlan.from_json(file.read_text(encoding="utf-8"))
            if plan.fit is None:
                raise ValueError(
                    "expected a fitted plan, got one without rows; make it with `fastcache plan --frontier`"
                )
        except OSError as error:
            raise ValueError(
                f"expected --plans to be a folder of `fastcache plan --frontier`, got {file}: {error.strerror}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        plans[quality], weights[name] = plan, plan.fit.weights_sha256
    if len(set(weights.values())) > 1:
        raise ValueError(f"expected plans fitted for the same weights in {folder}, got others; make them anew")
    return PlanFolder(folder, plans, weights["draft"])


def plans_for(folders: Sequence[PlanFolder], manifest: Manifest) -> Plans:
    """The plans that were fitted for a bundle's weights; of several folders those of the last."""
    found = [one.plans for one in folders if one.weights_sha256 == manifest.weights_sha256]
    return found[-1] if found else {}


def plan_used(name: str, plan: CachePlan) -> PlanUsed:
    """What clients are told of a plan."""
    full = sum(plan.is_full(step) for step in range(plan.num_steps))
    psnr_db = None if plan.fit is None else plan.fit.psnr_db
    return PlanUsed(name=name, unet_calls=plan.num_steps, full_calls=full, psnr_db=psnr_db)


def offered_qualities(plans: Plans) -> list[QualityOffered]:
    """The qualities of a model's plans, the best last."""
    return [
        QualityOffered(
            quality=quality,
            plan=plan_used(name, plans[quality]),
            sampler=plans[quality].sampler,
            num_inference_steps=fit.num_inference_steps,
        )
        for quality, name in PLAN_NAMES.items()
        if quality in plans and (fit := plans[quality].fit) is not None
    ]


def read_offered(
    models: Sequence[Listed], folders: Sequence[PlanFolder], trusted: Path | None = None
) -> dict[str, Manifest]:
    """The manifests of bundles by the names that clients use.

    Raises: `BundleError` for a folder that is none; `ValueError` for equal names, and for plans for none of them.
    """
    manifests = [read_manifest(one.engines, trusted) for one in models]
    names = [one.called(manifest) for one, manifest in zip(models, manifests, strict=True)]
    require_different(names)
    require_used(folders, manifests)
    return dict(zip(names, manifests, strict=True))


def require_used(folders: Sequence[PlanFolder], manifests: Sequence[Manifest]) -> None:
    """Raises: `ValueError` for a folder whose plans were fitted for none of these."""
    served = {manifest.weights_sha256 for manifest in manifests}
    for one in folders:
        if one.weights_sha256 not in served:
            raise ValueError(
                f"expected plans fitted for a model that is served, got {one.folder} for other weights; "
                "make them anew with `fastcache plan --frontier`"
            )
