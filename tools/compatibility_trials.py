"""A call of one of diffusers' pipelines -> what `FastCacheHelper` and a bundle of the same model make of it, in words.

Knows nothing of what is tried, or of what is written about it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import tempfile
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compatibility_subjects import IP_SCALE, SD, SHARED, SUBJECTS, bundle_arguments, bundle_fields
from diffusers import DiffusionPipeline
from parity import agreement_db
from parity_subjects import STEPS, Subject, seeded
from torch import Tensor

import fastcache
from fastcache import FastCacheHelper, FastCachePipeline
from fastcache.bundle.recipe import recipe_from
from fastcache.errors import BackendUnavailable, BuildError, BundleError

_SAME_DB = {"helper": 100.0, "bundle": 50.0}  # to the bit but for threads; fp32 engines, which add up in another order
_REFUSALS = (ValueError, BundleError, BackendUnavailable, BuildError)
WORKS = "works"


class Trials:
    """Calls of pipelines, by diffusers, under the helper and of a bundle."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.subject = cache(self._subject)
        self.bundle = cache(self._bundle)

    @staticmethod
    def _subject(name: str) -> Subject:
        subject = SUBJECTS[name]()
        subject.pipe.set_progress_bar_config(disable=True)
        return subject

    def _bundle(self, name: str) -> FastCachePipeline | str:
        """The pipeline of a bundle, or the line with which it is not built."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        fields = bundle_fields(name, self.subject(name), folder)
        try:
            return fastcache.load(fastcache.build_engines(recipe_from(fields), output=folder / "bundle").path)
        except _REFUSALS as error:
            return refused(error, folder)

    def all_three(self, name: str, scheduler: Any = None, **arguments: Any) -> tuple[str, str] | None:
        """What helper and bundle say to a call; nothing where diffusers itself does not make it."""
        subject = self.subject(name)
        with _scheduled(subject.pipe, scheduler):
            try:
                plain = drawn(subject.pipe, **subject.arguments | arguments)
            except Exception:  # whatever diffusers raises for what it does not do
                return None
            return (
                self._helper(subject, plain, arguments),
                self._of_bundle(name, subject, plain, arguments),
            )

    def _helper(self, subject: Subject, plain: Tensor, arguments: dict[str, Any]) -> str:
        def draw(interval: int) -> Tensor:
            helper = FastCacheHelper(subject.pipe)
            helper.set_params(cache_interval=interval, cache_branch_id=0)
            with helper:
                return drawn(subject.pipe, **subject.arguments | arguments)

        return outcome(draw, plain, _SAME_DB["helper"])

    def _of_bundle(self, name: str, subject: Subject, plain: Tensor, arguments: dict[str, Any]) -> str:
        pipe = self.bundle(SHARED.get(name, name))
        if isinstance(pipe, str):
            if not arguments:
                return pipe
            pipe = self.bundle(SD)  # which is asked with this argument instead
        if isinstance(pipe, str):
            raise RuntimeError(f"expected a bundle of {SD}, got: {pipe}")
        usual = inspect.signature(type(subject.pipe).__call__).parameters
        own = {key: usual[key].default for key in ("guidance_scale", "image_guidance_scale") if key in usual}
        given = own | bundle_arguments(name, subject._replace(arguments=subject.arguments | arguments))
        sampler = None if {"original_inference_steps"} & arguments.keys() else subject.pipe.scheduler
        return outcome(
            lambda interval: drawn(pipe, **given, sampler=sampler, cache_interval=interval), plain, _SAME_DB["bundle"]
        )


@contextlib.contextmanager
def _scheduled(pipe: Any, scheduler: Any) -> Generator[None]:
    """A pipeline with another scheduler, if one is named, and afterwards with its own."""
    own = pipe.scheduler
    try:
        if scheduler is not None:
            pipe.scheduler = scheduler.from_config(own.config)
        yield
    finally:
        pipe.scheduler = own


def drawn(pipe: Any, **arguments: Any) -> Tensor:
    """What a call draws, as a tensor; generators begin anew with each call."""
    given = {"generator": seeded(1), "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    given = {key: _anew(value) for key, value in given.items()}
    if given.keys() & {"timesteps", "sigmas"}:
        del given["num_inference_steps"]
    if "ip_adapter_image_embeds" in given and isinstance(pipe, DiffusionPipeline):
        pipe.set_ip_adapter_scale(IP_SCALE)  # which a callback may have changed in the run before
    torch.manual_seed(0)  # a few schedulers draw their noise without a generator
    result = pipe(**given)
    images = getattr(result, "images", None)
    return torch.as_tensor(np.asarray(result[0] if images is None else images)).float()


def _anew(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return seeded(value.initial_seed())
    return value.clone() if isinstance(value, Tensor) else value


def outcome(draw: Callable[[int], Tensor], plain: Tensor, same_db: float) -> str:
    """`works`, or what does not: with nothing cached the picture is diffusers' own, with a cache there is one."""
    try:
        uncached, cached = draw(1), draw(2)
    except _REFUSALS as error:
        return refused(error)
    except Exception as error:  # a fault of ours, which the document is to show
        return f"fails: `{type(error).__name__}: {_line(error)}`"
    if uncached.shape != plain.shape or not uncached.isfinite().all() or agreement_db(uncached, plain) < same_db:
        return "draws another picture"
    return WORKS if cached.isfinite().all() else "draws no picture with a cache"


def refused(error: Exception, folder: Path | None = None) -> str:
    return f"refused: `{_line(error, folder)}`"


def _line(error: Exception, folder: Path | None = None) -> str:
    """An error's line without what is of this run alone."""
    text = " ".join(str(error).split()).replace("`", "'")
    if folder is not None:
        text = text.replace(str(folder / "model"), "MODEL").replace(str(folder), "FOLDER")
    return re.sub(r"0x[0-9a-f]+", "0x...", text)


def outcome_of(call: Callable[[], object]) -> str:
    try:
        call()
    except _REFUSALS as error:
        return refused(error)
    return WORKS
