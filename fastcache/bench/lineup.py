"""Flags and this machine's backends -> the arms of a benchmark, the bundles they need, and why an arm cannot run.

Knows what is worth comparing with what; knows nothing about how an arm is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastcache
import fastcache_engines
from fastcache.bench.arms import AUTO, Arm, BenchSettings, Defaults, Precision, parse_arm, parse_arms, parse_precision
from fastcache.bench.work import empty_unet, geometry
from fastcache.bundle.bundle import Bundle, open_bundle
from fastcache.bundle.manifest import Defaults as ModelDefaults
from fastcache.bundle.manifest import Manifest
from fastcache.bundle.recipe import recipe_from
from fastcache.compile.builder import resolve
from fastcache.compile.describe import defaults_of
from fastcache.compile.models import find_model
from fastcache.cut.partition import partition_unet
from fastcache.errors import BackendUnavailable, BuildError
from fastcache.expect import one_of
from fastcache.sampler.scheduler import own_sampler
from fastcache_engines import BACKENDS, DType
from fastcache_engines.extras import install

_USUAL = "eager,deepcache,compile,engine,engine+cache"
BundleKey = tuple[str, Precision, int]


@dataclass(frozen=True)
class Lineup:
    """The arms of a benchmark in their order, and for some of them the reason why they cannot run."""

    arms: tuple[Arm, ...]
    skipped: Mapping[Arm, str]


@dataclass(frozen=True)
class Wishes:
    """What of a benchmark may be left to the model, the bundle or the machine: None where it is."""

    arms: str | None = None
    backend: str = AUTO
    device: str | None = None
    dtype: str | None = None
    branch_id: int | None = None
    height: int | None = None
    width: int | None = None


def of_bundle(
    engines: Path, wishes: Wishes, common: Mapping[str, Any]
) -> tuple[BenchSettings, Lineup, dict[BundleKey, Bundle]]:
    """A benchmark of the bundle in a folder; `common` are the settings that no bundle decides.

    Raises: `ValueError` for a wish that the bundle was not built for; `BundleError`.
    """
    bundle = open_bundle(engines)
    built = bundle.manifest
    others = [entry.kind.replace("_", "-") for entry in built.model.controls if entry.kind != "controlnet"]
    if others:
        raise ValueError(f"expected a bundle steered by ControlNets or nothing, got one with {', '.join(others)}")
    for name, asked, is_ in (
        ("height", wishes.height, built.height),
        ("width", wishes.width, built.width),
        ("branch-id", wishes.branch_id, built.branch_id),
        ("dtype", wishes.dtype, precision_of(built)),
        ("device", wishes.device, built.device_type),
        ("backend", None if wishes.backend == AUTO else wishes.backend, built.backend),
    ):
        if asked not in (None, is_):
            raise ValueError(f"expected --{name} {is_}, which {engines} was built for, got {asked}")
    settings = BenchSettings(
        model=built.recipe.model,
        random_weights=built.model.random_weights,
        device=built.device_type,
        branch_id=built.branch_id,
        height=built.height,
        width=built.width,
        dtype=precision_of(built),
        guided_rows=built.model.guided_rows,
        controlnets=built.recipe.controls.get("controlnet", ()),
        **_own_ways(common, built.model.scheduler, built.model.defaults),
    )
    defaults = Defaults(built.backend, precision_of(built), settings.cache_interval, built.branch_id)
    bundles: dict[BundleKey, Bundle] = {(built.backend, precision_of(built), built.branch_id): bundle}
    return settings, line_up_bundle(wishes.arms, defaults, bundle), bundles


def precision_of(built: Manifest) -> Precision:
    """What a bundle computes in, as arms call it."""
    return built.dtype if built.quantized is None else built.quantized.scheme


def of_model(
    name: str, random_weights: bool, wishes: Wishes, common: Mapping[str, Any]
) -> tuple[BenchSettings, Lineup]:
    """A benchmark of a model, its bundles still to be built; `common` are the settings that no model decides.

    Raises: `ValueError` for a model that is not there, or a wish that does not fit it.
    """
    model = find_model(name, random_weights=random_weights)
    model.require_pictures()
    shapes = geometry(model)
    height, width = shapes.size(wishes.height, wishes.width)
    dtype = parse_precision(wishes.dtype or "fp32")
    one_of("a backend", wishes.backend, (AUTO, *BACKENDS))
    if wishes.device not in (None, "cpu", "cuda"):
        raise ValueError(f"expected device cpu or cuda, got {wishes.device!r}")
    settings = BenchSettings(
        model=name,
        random_weights=random_weights,
        device=wishes.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        branch_id=wishes.branch_id or 0,
        height=height,
        width=width,
        dtype=dtype,
        guided_rows=shapes.guided_rows,
        **_own_ways(common, model.scheduler, defaults_of(model)),
    )
    partition_unet(empty_unet(model), settings.branch_id)  # refuses a branch that is not there, before any build
    defaults = Defaults(wishes.backend, dtype, settings.cache_interval, settings.branch_id)
    return settings, line_up(wishes.arms, defaults, settings.device)


def _own_ways(common: Mapping[str, Any], scheduler: Mapping[str, Any], own: ModelDefaults) -> dict[str, Any]:
    """The settings with the model's own guidance, and its own sampler where none is named."""
    guidance = {"guidance_scale": own.guidance_scale, "image_guidance_scale": own.image_guidance_scale}
    return {**common, **guidance, "sampler": common.get("sampler") or own_sampler(scheduler)}


def fast_dtypes(device: str) -> tuple[DType, ...]:
    """float32, and what the device multiplies faster than that."""
    if device == "cuda":
        return "fp32", "fp16"
    return ("fp32", "bf16") if fastcache_engines.fast_bf16() else ("fp32",)


def line_up(names: str | None, defaults: Defaults, device: str) -> Lineup:
    """The arms named, or else those worth comparing here, for bundles that are still to be built.

    Raises: `ValueError` for a name that is no arm's.
    """
    arms = parse_arms(names if names is not None else _USUAL, defaults)
    if names is not None:
        return line_up_arms(arms, device)
    settled = [_settle(arm, device) for arm in arms]
    known = {arm.meaning for arm in settled}
    return line_up_arms([*settled, *(arm for arm in _further(defaults, device) if arm.meaning not in known)], device)


def line_up_arms(arms: Iterable[Arm], device: str) -> Lineup:
    """Arms with every `auto` settled, and the reasons of those that cannot run here as far as is known beforehand."""
    settled = tuple(_settle(arm, device) for arm in arms)
    return Lineup(settled, {arm: reason for arm in settled if (reason := _obstacle(arm, device)) is not None})


def line_up_bundle(names: str | None, defaults: Defaults, bundle: Bundle) -> Lineup:
    """The arms named, or else the usual ones, for one bundle that is there.

    Raises: `ValueError` for a name that is no arm's, or an engine arm that the bundle is not built for.
    """
    built = bundle.manifest
    arms = tuple(
        replace(arm, backend=built.backend) if arm.backend == AUTO else arm
        for arm in parse_arms(names if names is not None else _USUAL, defaults)
    )
    for arm in arms:
        if arm.is_engine and (arm.backend, arm.dtype) != (built.backend, precision_of(built)):
            raise ValueError(
                f"expected engine arms of {built.backend} in {precision_of(built)}, which {bundle.path} was built for, "
                f"got {arm.name!r}; name the model (--model) to build others"
            )
    missing = {arm: _without_gpu(arm, built.device_type) or _without_package(arm) for arm in arms}
    return Lineup(arms, {arm: reason for arm, reason in missing.items() if reason is not None})


def by_plans(lineup: Lineup, plans: Sequence[Path]) -> Lineup:
    """The line-up with its cached engine arms once for each plan in a file, which stands for their interval.

    Without plans it is as it was. Raises: `ValueError` where no arm would draw by one.
    """
    if plans and not any(arm.is_engine and arm.is_cached for arm in lineup.arms):
        raise ValueError("expected an arm engine+cache, which draws by --plan, got none; name one in --arms")
    arms, skipped = list[Arm](), dict[Arm, str]()
    for arm in lineup.arms:
        draws_by = dict.fromkeys(plans) if arm.is_engine and arm.is_cached else ()
        those = [replace(arm, name=f"{arm.name} {plan.stem}", plan=str(plan)) for plan in draws_by] or [arm]
        arms += those
        if arm in lineup.skipped:
            skipped |= dict.fromkeys(those, lineup.skipped[arm])
    return Lineup(tuple(arms), skipped)


def build_bundles(
    lineup: Lineup, settings: BenchSettings, folder: Path, say: Callable[[str], None], *, whole: bool = False
) -> tuple[dict[BundleKey, Bundle], Lineup]:
    """A bundle for every backend, dtype and branch in the line-up, in subfolders that later benchmarks find again.

    They hold the U-Net alone or, as a `whole`, the text encoders and the VAE, too. Arms whose bundle cannot be built
    are skipped in the line-up that comes back, with the reason.
    """
    bundles: dict[BundleKey, Bundle] = {}
    failed: dict[BundleKey, str] = {}
    for key in dict.fromkeys(arm.bundle_key for arm in lineup.arms if arm.is_engine and arm not in lineup.skipped):
        try:
            bundles[key] = _build(key, settings, folder, say, whole)
        except (BackendUnavailable, BuildError, ValueError) as error:
            failed[key] = str(error)
    further = {arm: failed[arm.bundle_key] for arm in lineup.arms if arm.is_engine and arm.bundle_key in failed}
    return bundles, replace(lineup, skipped={**lineup.skipped, **further})


def _build(key: BundleKey, settings: BenchSettings, folder: Path, say: Callable[[str], None], whole: bool) -> Bundle:
    backend, dtype, branch_id = key
    values: dict[str, Any] = {
        "model": settings.model,
        "random_weights": settings.random_weights,
        "backend": backend,
        "device": settings.device,
        **({"quantize": dtype} if dtype == "int8" else {"dtype": dtype}),
        "branch_id": branch_id,
        "height": settings.height,
        "width": settings.width,
        "batch": f"1:{settings.batch}:{settings.batch}",
        "components": None if whole else ("unet",),
    }
    recipe = recipe_from(values)
    name = settings.model.replace("/", "-")[-40:].strip("-.")
    place = folder / f"{name}-{resolve(recipe).key[:16]}"
    say(f"{backend} engines in {dtype} in {place}")
    return fastcache.build_engines(recipe, place, progress=say)


def _settle(arm: Arm, device: str) -> Arm:
    """The arm with the backend that `auto` means, where there is one."""
    if arm.backend != AUTO:
        return arm
    try:
        if arm.dtype == "int8":
            return replace(arm, backend=fastcache_engines.choose_with_dtype(device)[0])
        return replace(arm, backend=fastcache_engines.choose(device, arm.dtype)[0])
    except BackendUnavailable:
        return arm


def _further(defaults: Defaults, device: str) -> Iterable[Arm]:
    """What else is worth a look here: reduced precision, and every backend in each dtype that the device is fast at."""
    dtypes = fast_dtypes(device)
    yield from (parse_arm(f"{kind}:{dtype}", defaults) for kind in ("eager", "deepcache") for dtype in dtypes)
    for name in BACKENDS:
        module = fastcache_engines.backend(name)
        can = module.CAPABILITIES
        found = module.support(device)
        if not (found.can_build and found.can_run):
            yield parse_arm(f"engine:{name}", defaults)
            continue
        kinds = ["engine", "engine+cache"] + ["engine+cache+graph"] * (device == "cuda" and can.captured)
        for dtype in (dtype for dtype in dtypes if dtype in can.computes(device)):
            yield from (parse_arm(f"{kind}:{name}:{dtype}", defaults) for kind in kinds)


def _obstacle(arm: Arm, device: str) -> str | None:
    """Why an arm cannot run here, as far as that is known before it is built."""
    if not arm.is_engine:
        return _without_package(arm)
    if (reason := _without_gpu(arm, device)) is not None:
        return reason
    if arm.backend == AUTO:
        try:
            fastcache_engines.choose(device, "fp32" if arm.dtype == "int8" else arm.dtype)
        except BackendUnavailable as error:
            return str(error)
    module = fastcache_engines.backend(arm.backend)
    found, dtypes = module.support(device), module.CAPABILITIES.computes(device)
    if not (found.can_build and found.can_run):
        return found.reason
    if arm.dtype == "int8":
        return _without_8_bits(arm, device)
    if arm.dtype not in dtypes:
        return f"{arm.backend} computes in {' or '.join(dtypes)} on {device}, not in {arm.dtype}"
    return None


def _without_gpu(arm: Arm, device: str) -> str | None:
    return f"a CUDA graph runs on a GPU only, not on {device}" if arm.is_graph and device != "cuda" else None


def _without_8_bits(arm: Arm, device: str) -> str | None:
    if not fastcache_engines.backend(arm.backend).CAPABILITIES.quantized or device != "cpu":
        return f"8-bit layers run on a CPU with {fastcache_engines.backends_with('quantized')}, not {arm.backend} there"
    if importlib.util.find_spec("nncf") is None:
        return f"NNCF, which chooses 8-bit ranges, is not installed; run: {install('int8')}"
    return None


def _without_package(arm: Arm) -> str | None:
    if arm.kind == "deepcache" and importlib.util.find_spec("DeepCache") is None:
        return f"the DeepCache package is not installed; run: {install('bench')}"
    return None
