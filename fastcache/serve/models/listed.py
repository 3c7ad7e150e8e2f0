"""What is said of models on a command line, in a file or by an administrator -> values. Loads nothing.

A file of models is TOML, a table for each model:

    [[model]]
    engines = "engines/demo"     # from the file's folder on
    name = "demo-fast"           # the model's own name if left out
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastcache.bundle.manifest import Manifest
from fastcache.expect import first_problem

# What a client can say in a URL and a log can hold on a line; hub ids have a slash.
NAME = r"[A-Za-z0-9][A-Za-z0-9._+/-]{0,127}"


@dataclass(frozen=True)
class Listed:
    """A model to offer: the folder of its bundle, and what to call it; None for the model's own name."""

    engines: Path
    name: str | None = None

    def called(self, manifest: Manifest) -> str:
        """The name that clients use: of a bundle with merged LoRAs also theirs, as `demo+watercolour`."""
        loras = (Path(lora.name).stem for lora in manifest.model.loras)
        return self.name or "+".join((manifest.model.public_name, *loras))


@dataclass(frozen=True)
class Offer:
    """What a server offers: its models, the first of which is the default, and how they are loaded.

    `file` names the models, and is read again at a reload. With `trusted`, a public key's file, only bundles that it
    has signed are loaded, now and later. Units: bytes, of all loaded bundles together.
    """

    models: tuple[Listed, ...]
    file: Path | None = None
    memory_limit_bytes: int | None = None
    plans: tuple[Path, ...] = ()  # folders, each fitted for one of the models
    trusted: Path | None = None


def listed(text: str) -> Listed:
    """`DIR`, or `NAME=DIR`. A folder that is there is one, be there a = in its name.

    Raises: `ValueError` for a folder that is not there, or a name that no client could say.
    """
    name, sign, folder = text.partition("=")
    if Path(text).exists() or not sign:
        name, sign, folder = "", "", text
    if not Path(folder).exists():
        raise ValueError(
            f"expected --engines to be a bundle's folder, or NAME=FOLDER, got {text}; make one with build-engines"
        )
    if sign and not re.fullmatch(NAME, name):
        raise ValueError(f"expected a name of letters, digits and . _ + / - before =, got {name}; choose another name")
    return Listed(Path(folder), name or None)


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: Path
    name: Annotated[str | None, Field(pattern=f"^{NAME}$")] = None


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: list[_Entry] = Field(min_length=1)


def read_models(file: Path) -> list[Listed]:
    """The models in a file. Raises: `ValueError` that names the file and what is wrong with it."""
    try:
        content = _File.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"expected --models to be a file, got {file}: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(
            f"expected [[model]] tables with engines in {file}, got {first_problem(error, 'it')}"
        ) from None
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise ValueError(f"expected TOML in {file}, got: {' '.join(str(error).split())}") from None
    return [Listed(file.parent / entry.engines, entry.name) for entry in content.model]


def require_different(names: Iterable[str]) -> None:
    """Raises: `ValueError` for two models of one name."""
    seen = set[str]()
    for name in names:
        if name in seen:
            raise ValueError(
                f"expected models of different names, got two called {name}; say --engines NAME=FOLDER for one of them"
            )
        seen.add(name)
