"""The bodies of the API, as OpenAI's images API has them: what a request may hold, what an answer holds.

Knows JSON only: whether a request fits the bundle that is served is `requests.py`'s business.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from fastcache.sampler.scheduler import SAMPLERS

JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"

OutputFormat = Literal["png", "jpeg", "webp"]
State = Literal["loading", "ready", "draining", "broken"]  # of a server


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"expected a sampler out of {', '.join(SAMPLERS)}, got another")
    return name


Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Sampler = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list(SAMPLERS)})]


class ImageRequest(BaseModel):
    """`POST /v1/images/generations`. A field left out or null has its default; one that is not here is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str = Field(min_length=1, max_length=10_000, description="What to draw.")
    model: str | None = Field(None, max_length=256, description="The model's id, as /v1/models lists it.")
    n: Whole | None = Field(None, ge=1, le=10, description="How many images (1); seeds count up from `seed`.")
    size: str | None = Field(None, max_length=32, description="WIDTHxHEIGHT of /v1/models, or auto (the first).")
    response_format: Literal["b64_json"] | None = Field(None, description="Images come in the answer, not by URL.")
    output_format: OutputFormat | None = Field(None, description="png, jpeg or webp (png).")
    output_compression: Whole | None = Field(None, ge=0, le=100, description="Quality of a jpeg or webp (100).")
    stream: Flag | None = Field(None, description="Answer with server-sent events (false); n must be 1.")
    partial_images: Whole | None = Field(None, ge=0, le=16, description="Images on the way, with `stream` (0).")
    stream_steps: Flag | None = Field(None, description="An event for each U-Net step, with `stream` (false).")
    negative_prompt: str | None = Field(None, max_length=10_000, description="What not to draw (nothing).")
    num_inference_steps: Whole | None = Field(None, ge=1, le=1000, description="Denoising steps (the model's own).")
    guidance_scale: Number | None = Field(None, ge=0, le=100, description="Guidance (the model's); 1 or less is none.")
    seed: Whole | None = Field(None, ge=0, le=2**63 - 11, description="The first image's seed (random).")
    sampler: Sampler | None = Field(None, description="A sampler (the model's own).")
    cache_interval: Whole | None = Field(None, ge=1, le=1000, description="Refresh the feature every N steps (1).")
    plan: dict[str, Any] | None = Field(None, description="A plan, as `fastcache plan` writes it.")
    timeout: Number | None = Field(None, ge=1, description="Seconds to wait at most; the server's own limit or less.")
    job_id: str | None = Field(None, pattern=JOB_ID, description="A name to cancel it by (the server gives one).")
    # What OpenAI's clients always send, with the values that mean what this server does.
    quality: Literal["auto", "standard"] | None = Field(None, description="OpenAI's: as the other fields say.")
    style: Literal["vivid"] | None = Field(None, description="OpenAI's default; a style belongs into the prompt here.")
    background: Literal["auto", "opaque"] | None = Field(None, description="OpenAI's: pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="OpenAI's: nothing is moderated here.")
    user: str | None = Field(None, max_length=256, description="OpenAI's: not used, kept or logged.")

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def file_format(self) -> OutputFormat:
        return self.output_format or "png"


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str
    seed: int


class ImagesResponse(BaseModel):
    """The answer to `POST /v1/images/generations`."""

    id: str
    created: int
    model: str
    size: str
    output_format: OutputFormat
    data: list[ImageData]


class Usual(BaseModel):
    """What a request is drawn with that does not say."""

    sampler: str
    num_inference_steps: int
    guidance_scale: float


class Model(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fastcache"
    sizes: list[str]
    samplers: list[str]
    defaults: Usual
    bundle_sha256: str
    loaded: bool = Field(description="Whether a request need not wait for it to be loaded.")


class Models(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ModelPut(BaseModel):
    """`PUT /v1/admin/models/{name}`: the bundle to offer under this name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: str = Field(min_length=1, max_length=4096, description="The bundle's folder on the server's machine.")


class ModelDropped(BaseModel):
    """The answer to `DELETE /v1/admin/models/{name}`; what was accepted for it is finished."""

    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Cancelled(BaseModel):
    """The answer to `POST /v1/jobs/{job_id}/cancel`: `cancelled` or, if the job was over, how it had ended."""

    id: str
    status: str


class Health(BaseModel):
    """The answer to `GET /health` and the probes."""

    status: State


class HealthInDetail(Health):
    """`GET /health`: also what is being done."""

    model: str | None
    running: int
    waiting: int
    bundles: int
    loaded: list[str]
    max_batch: int | None
    queue: int


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
