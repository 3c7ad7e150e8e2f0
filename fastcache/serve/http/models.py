"""The routes about models: which are offered, and for an administrator which shall be. Knows nothing about images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Final

from fastapi import FastAPI, Path

from fastcache.sampler.scheduler import SAMPLERS
from fastcache.sampler.stored import Samplers
from fastcache.serve.http.errors import ApiError
from fastcache.serve.http.schema import Model, ModelDropped, ModelPut, Models, Usual
from fastcache.serve.http.service import Service
from fastcache.serve.models.listed import NAME
from fastcache.serve.models.quality import offered_qualities, plans_for
from fastcache.serve.models.shelf import Entry

ADMIN_PATH: Final = "/v1/admin/"  # what lies below needs an administrator's key

Errors = Callable[..., dict[int | str, dict[str, Any]]]
Name = Annotated[str, Path(pattern=f"^{NAME}$")]


def described(entry: Entry, service: Service) -> Model:
    """What clients are told of a model."""
    manifest = entry.manifest
    model, served = manifest.model, entry.served
    samplers = Samplers(model.scheduler) if served is None else served.executor.pipe.bundle.samplers
    return Model(
        id=entry.name,
        created=entry.created,
        sizes=[str(size) for size in manifest.sizes],
        samplers=list(SAMPLERS),
        defaults=Usual(
            sampler=samplers.own,
            num_inference_steps=min(model.defaults.num_inference_steps, service.limits.max_steps),
            guidance_scale=model.defaults.guidance_scale,
        ),
        edits="vae_encoder" in manifest.engines,
        qualities=offered_qualities(plans_for(service.catalogue.plans, manifest) if served is None else served.plans),
        bundle_sha256=manifest.bundle_sha256,
        loaded=served is not None,
    )


def add_models(app: FastAPI, service: Service, errors: Errors, always: tuple[int, ...]) -> None:
    """The routes that every client may ask."""

    def offered() -> Mapping[str, Entry]:
        if service.state == "loading" and not service.served:
            service.require_ready()
        return service.shelf.entries

    @app.get("/v1/models", responses=errors(*always, 503))
    async def models() -> Models:
        """The models that are offered, the one first that is drawn with where a request names none."""
        return Models(data=[described(entry, service) for entry in offered().values()])

    @app.get("/v1/models/{model_id:path}", responses=errors(*always, 404, 503))
    async def model(model_id: str) -> Model:
        """One model by its id."""
        offered()
        return described(service.shelf.find(model_id), service)


def add_admin(app: FastAPI, service: Service, errors: Errors, always: tuple[int, ...]) -> None:
    """The routes that change what is offered, for who has an administrator's key: a bundle is code."""

    @app.put(f"{ADMIN_PATH}models/{{name:path}}", responses=errors(*always, 409, 415, 503))
    async def put(name: Name, asked: ModelPut) -> Model:
        """Offer a bundle under a name, in place of another of that name; answered once it is loaded."""
        service.require_ready()
        entry = await service.catalogue.put(name, FilePath(asked.engines))
        return described(entry, service)

    @app.delete(f"{ADMIN_PATH}models/{{name:path}}", responses=errors(*always, 404, 409, 503))
    async def drop(name: Name) -> ModelDropped:
        """Offer a model no more; what was accepted for it is finished."""
        service.require_ready()
        await service.catalogue.drop(name)
        return ModelDropped(id=name)


def refuse_admin(app: FastAPI) -> None:
    """Say what is missing where a server has no administrator."""

    @app.api_route(
        f"{ADMIN_PATH}{{rest:path}}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"], include_in_schema=False
    )
    async def refuse(rest: str) -> None:
        message = "expected a server started with --admin-key-file for routes that change what it serves"
        raise ApiError(403, message, code="no_admin_key")
