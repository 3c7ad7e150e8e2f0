"""What to build, as one checked value: the flags of `build-engines` or a TOML file.

Knows names and ranges; knows nothing about models on disk or how engines are made.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from fastcache.cut.names import BlockKind, CutWish
from fastcache.expect import shown
from fastcache_engines import BACKENDS, Device, DType

Component = Literal["unet", "vae", "text"]
ControlKind = Literal["controlnet", "t2i_adapter", "ip_adapter"]  # networks beside the U-Net that a picture steers


def _known(backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"expected auto or a backend out of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


Backend = Annotated[str, AfterValidator(_known)]
_PACKAGE = Path(__file__).parents[1]
# A wheel carries the recipes inside the package; a checkout, installed as editable or not, has them beside it.
_RECIPES = next(
    (p for p in (_PACKAGE / "recipes", _PACKAGE.parent / "engines" / "recipes") if p.is_dir()), _PACKAGE / "recipes"
)


class Profile(BaseModel):
    """How many images a bundle serves at once: least, usual and most."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: int = Field(1, ge=1)
    opt: int = Field(1, ge=1)
    max: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"expected MIN <= OPT <= MAX, got {self}")
        return self

    @classmethod
    def parse(cls, text: object) -> object:
        """`N` or `MIN:OPT:MAX`; anything else is left for validation to refuse."""
        if not isinstance(text, str | int) or isinstance(text, bool):
            return text
        numbers = str(text).split(":")
        if len(numbers) not in (1, 3) or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"expected N or MIN:OPT:MAX, got {text!r}")
        low, usual, high = map(int, numbers * 3 if len(numbers) == 1 else numbers)
        return {"min": low, "opt": usual, "max": high}

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"


class Size(BaseModel):
    """The size of an image, in pixels; written WIDTHxHEIGHT."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(ge=8, le=8192)
    height: int = Field(ge=8, le=8192)

    @classmethod
    def parse(cls, text: object) -> object:
        """`WIDTHxHEIGHT`; anything but a string is left for validation to refuse."""
        if not isinstance(text, str):
            return text
        numbers = text.lower().split("x")
        if len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
            raise ValueError(f"expected WIDTHxHEIGHT, got {text!r}")
        return {"width": int(numbers[0]), "height": int(numbers[1])}

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Lora(BaseModel):
    """A LoRA to merge into the model: a safetensors file, and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(min_length=1)
    weight: float = 1.0

    @classmethod
    def parse(cls, text: object) -> object:
        """`PATH` or `PATH:WEIGHT`; anything but a string is left for validation to refuse."""
        if not isinstance(text, str):
            return text
        path, colon, weight = text.rpartition(":")
        try:
            return {"path": path, "weight": float(weight)} if colon else {"path": text}
        except ValueError:  # the colon belongs to the path
            return {"path": text}

    def __str__(self) -> str:
        return f"{self.path}:{self.weight:g}"


def _no_switch(value: object) -> object:
    if isinstance(value, bool):  # which pydantic would take for 0 or 1
        raise ValueError(f"expected a number, got {value}")
    return value


_Path = Annotated[str, Field(min_length=1)]
_Id = Annotated[int, BeforeValidator(_no_switch), Field(ge=0)]


class Recipe(BaseModel):
    """Everything that decides what a bundle contains, given the model's weights and this installation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("demo", min_length=1)
    revision: str | None = None
    random_weights: StrictBool = False
    branch_id: _Id = 0
    further_branch_ids: tuple[_Id, ...] = ()
    cut: CutWish = "auto"
    blocks: tuple[BlockKind, ...] = ()
    backend: Backend = "auto"
    device: Device | None = None
    dtype: DType | Literal["auto"] = "auto"
    quantize: Literal["int8"] | None = None
    height: StrictInt | None = Field(None, ge=8, le=8192)
    width: StrictInt | None = Field(None, ge=8, le=8192)
    sizes: tuple[Annotated[Size, BeforeValidator(Size.parse)], ...] = ()
    batch: Annotated[Profile, BeforeValidator(Profile.parse)] = Profile(min=1, opt=1, max=4)
    max_tokens: StrictInt | None = Field(None, ge=1, le=4096)
    lora: tuple[Annotated[Lora, BeforeValidator(Lora.parse)], ...] = ()
    controlnet: _Path | tuple[_Path, ...] | None = None
    t2i_adapter: str | None = Field(None, min_length=1)
    ip_adapter: str | None = Field(None, min_length=1)
    vae: str | None = Field(None, min_length=1)
    vae_tile: StrictInt | None = Field(None, ge=64, le=4096)
    preview_vae: str | None = Field(None, min_length=1)
    components: tuple[Component, ...] | None = None
    compute_capability: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    onnx_only: StrictBool = False
    kernels: StrictBool = False

    @model_validator(mode="before")
    @classmethod
    def _split_branch_ids(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`branch_id` may name several, as a list or as 0,2: the first is the primary one."""
        given: Any = values.get("branch_id")
        ids: Any = given.split(",") if isinstance(given, str) else given
        if not isinstance(ids, list | tuple) or not ids:
            return values
        named = cast("list[Any]", ids)
        return {**values, "branch_id": named[0]} | ({"further_branch_ids": tuple(named[1:])} if named[1:] else {})

    @field_validator("blocks", mode="before")
    @classmethod
    def _split_blocks(cls, value: object) -> object:
        """One kind of blocks, several, or several as one text: transformer,resnet."""
        return tuple(dict.fromkeys(value.split(","))) if isinstance(value, str) else value

    @field_validator("controlnet", mode="before")
    @classmethod
    def _unwrap_one(cls, value: object) -> object:
        """One path, or none, means the same with a list around it."""
        if not isinstance(value, list | tuple):
            return value
        paths = cast("list[object]", value)
        return tuple(paths) if paths[1:] else next(iter(paths), None)

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if len(set(self.branches)) < len(self.branches):
            given = ", ".join(map(str, self.branches))
            raise ValueError(f"expected branch_id and further_branch_ids to name each branch once, got {given}")
        if self.components is not None and "unet" not in self.components:
            raise ValueError(f"expected components with 'unet' among them, got {', '.join(self.components) or 'none'}")
        if self.blocks and (self.cut == "projected" or self.kernels or self.controls):
            raise ValueError(
                "expected blocks with the plain cut, without kernels or networks beside the U-Net, got both; "
                "leave one out"
            )
        if self.quantize and (self.blocks or self.controls or self.kernels):
            raise ValueError(
                "expected quantize without blocks, kernels or networks beside the U-Net, got both; leave one out"
            )
        if self.sizes and (self.height or self.width):
            raise ValueError("expected either sizes or height and width, got both; leave one out")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"expected sizes to name each once, got {', '.join(map(str, self.sizes))}")
        return self

    @property
    def branches(self) -> tuple[int, ...]:
        """Every branch id to cut at, the primary one first."""
        return (self.branch_id, *self.further_branch_ids)

    @property
    def controls(self) -> dict[ControlKind, tuple[str, ...]]:
        """Where the networks are that steer the U-Net; of ControlNets there may be several."""
        given: dict[ControlKind, str | tuple[str, ...] | None] = {
            "controlnet": self.controlnet,
            "t2i_adapter": self.t2i_adapter,
            "ip_adapter": self.ip_adapter,
        }
        return {kind: (paths,) if isinstance(paths, str) else paths for kind, paths in given.items() if paths}


def recipe_from(values: dict[str, object]) -> Recipe:
    """A recipe from plain values.

    Raises: `ValueError` with one line for the first value that does not fit.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "value_error":  # raised above, and complete
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        raise ValueError(f"{where}: {first['msg']}, got {shown(first['input'])}") from None


def recipe_names() -> list[str]:
    """The recipes that come with fastcache."""
    return sorted(file.stem for file in _RECIPES.glob("*.toml"))


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The TOML file of a path, or of a recipe that comes with fastcache.

    Raises: `ValueError` listing the recipes' names if it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    if str(name) in recipe_names():
        return _RECIPES / f"{name}.toml"
    raise ValueError(f"expected a recipe file or one of {', '.join(recipe_names())}, got {str(name)!r}")


def recipe_from_toml(path: Path) -> Recipe:
    """A recipe from a TOML file with the fields of `Recipe`.

    Raises: `ValueError` for a file that is missing, not TOML, or holds a value that does not fit.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a recipe file, got {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a TOML recipe in {path}: {error}") from None
    return recipe_from(values)
