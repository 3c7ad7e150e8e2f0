"""The bodies of the API, as OpenAI's images API has them: what a request may hold, what an answer holds.

Knows JSON only: whether a request fits the bundle that is served is `requests.py`'s business.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    model_validator,
)

from fastcache.sampler.scheduler import SAMPLERS

JOB_ID = r"^[A-Za-z0-9_-]{1,64}$"

_MOST_PICTURES: Final = 16

OutputFormat = Literal["png", "jpeg", "webp"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
State = Literal["loading", "ready", "draining", "broken"]  # of a server


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"expected a sampler out of {', '.join(SAMPLERS)}, got another")
    return name


def _background(value: object) -> object:
    if value is None or isinstance(value, bool) or value in ("auto", "opaque"):
        return value
    raise ValueError("expected true or false (a job), or auto or opaque, as pictures are here, got another")


def _few(value: object) -> object:
    if isinstance(value, list) and not 1 <= len(cast("list[object]", value)) <= _MOST_PICTURES:
        raise ValueError(f"expected 1 to {_MOST_PICTURES} of them in a list, got {len(cast('list[object]', value))}")
    return cast(object, value)


Few = AfterValidator(_few)
Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Background = Annotated[
    bool | str, BeforeValidator(_background), WithJsonSchema({"enum": [True, False, "auto", "opaque"]})
]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Numbers = Annotated[Annotated[Number, Field(ge=-10, le=10)] | list[Annotated[Number, Field(ge=-10, le=10)]], Few]
Shares = Annotated[Annotated[Number, Field(ge=0, le=1)] | list[Annotated[Number, Field(ge=0, le=1)]], Few]
# A form's files come as bytes, JSON's as text.
Picture = Annotated[
    str | bytes,
    Field(min_length=1),
    WithJsonSchema({"type": "string", "minLength": 1, "description": "PNG, JPEG or WebP in base64, or a data: URL."}),
]
Pictures = Annotated[Picture | list[Picture], Few]
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
    quality: Literal["auto", "standard", "low", "medium", "high"] | None = Field(
        None, description="low, medium, high: the server's fitted plans; auto: medium if there are any; else as asked."
    )
    max_latency_ms: Number | None = Field(
        None, ge=1, description="Draw by the best plan that is done in time as the server stands now, or answer 422."
    )
    true_cfg_scale: Number | None = Field(None, ge=0, le=100, description="Another word for `guidance_scale`.")
    background: Background | None = Field(
        None, description="true: answer 202 at once, with a job to ask for. OpenAI's auto, opaque: pictures are opaque."
    )
    control_image: Pictures | None = Field(None, description="For the bundle's ControlNet; of several a list.")
    controlnet_conditioning_scale: Numbers | None = Field(None, description="How much it counts (1); or a list.")
    control_guidance_start: Shares | None = Field(None, description="The share of steps before the ControlNet (0).")
    control_guidance_end: Shares | None = Field(None, description="The share of steps at which it ends (1).")
    adapter_image: Picture | None = Field(None, description="For the bundle's T2I-Adapter.")
    adapter_conditioning_scale: Number | None = Field(None, ge=-10, le=10, description="How much it counts (1).")
    ip_adapter_image: Picture | None = Field(None, description="For the bundle's IP-Adapter.")
    ip_adapter_scale: Number | None = Field(None, ge=-10, le=10, description="How much it counts (1).")
    # What OpenAI's clients always send, with the values that mean what this server does.
    style: Literal["vivid"] | None = Field(None, description="OpenAI's default; a style belongs into the prompt here.")
    moderation: Literal["auto", "low"] | None = Field(None, description="OpenAI's: nothing is moderated here.")
    user: str | None = Field(None, max_length=256, description="OpenAI's: not used, kept or logged.")

    @model_validator(mode="after")
    def _one_guidance(self) -> Self:
        if None not in (self.true_cfg_scale, self.guidance_scale) and self.true_cfg_scale != self.guidance_scale:
            raise ValueError("expected guidance_scale or true_cfg_scale, which mean the same, got two numbers")
        return self

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def file_format(self) -> OutputFormat:
        return self.output_format or "png"

    @property
    def guidance(self) -> float | None:
        return self.guidance_scale if self.true_cfg_scale is None else self.true_cfg_scale

    @property
    def is_job(self) -> bool:
        """Whether it is answered at once, and the pictures are asked for later."""
        return self.background is True


class EditRequest(ImageRequest):
    """`POST /v1/images/edits`, as JSON or as a form: a picture to begin with, and where to draw on it."""

    image: Pictures = Field(description="What to begin with; a second one is shown to the bundle's IP-Adapter.")
    mask: Picture | None = Field(
        None, description="Drawn where it is transparent or, without transparency, white; else where `image` is."
    )
    strength: Number | None = Field(None, gt=0, le=1, description="How much of it to draw anew (the model's).")
    input_fidelity: Literal["low", "high"] | None = Field(
        None, description="OpenAI's: high is a `strength` of 0.5, low the model's own."
    )

    @model_validator(mode="after")
    def _one_strength(self) -> Self:
        if self.input_fidelity == "high" and self.strength is not None:
            raise ValueError("expected strength or input_fidelity high, which says it as well, got both")
        return self

    @property
    def begins_at(self) -> float | None:
        return 0.5 if self.input_fidelity == "high" else self.strength


class PlanUsed(BaseModel):
    """Which plan drew a picture: draft, standard or fine; uncached; interval; or given, in the request."""

    name: str
    unet_calls: int
    full_calls: int
    psnr_db: float | None = Field(None, description="To uncached pictures, as measured when the plan was fitted.")


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
    quality: str | None = None
    plan: PlanUsed
    data: list[ImageData]


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class JobStatus(BaseModel):
    """The answer to a request with `background` true, and to `GET /v1/jobs/{job_id}`."""

    id: str
    object: Literal["job"] = "job"
    created: int
    status: JobState
    position: int | None = Field(None, description="Of a queued job how many images are before it.")
    step: int = Field(description="Steps taken by all its images.")
    num_steps: int
    preview_b64_json: str | None = Field(None, description="The last image on the way, with `partial_images`.")
    result: ImagesResponse | None = None
    error: ErrorDetail | None = None
    kept_s: int | None = Field(None, description="For how long an ended job is kept, if no newer ones need its room.")


class QualityOffered(BaseModel):
    """A quality, the plan that it stands for, and the uncached run that the plan was fitted to."""

    quality: str
    plan: PlanUsed
    sampler: str | None
    num_inference_steps: int


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
    edits: bool = Field(description="Whether it takes pictures to begin with.")
    qualities: list[QualityOffered] = Field(description="Those of its fitted plans, the best last.")
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


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail
