"""What a benchmark runs: arms by name, and the settings that all of them share.

Plain values: knows nothing about torch, processes or bundles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from fastcache.expect import one_of
from fastcache_engines import BACKENDS, DType

Kind = Literal["eager", "deepcache", "compile", "engine", "engine+cache", "engine+graph", "engine+cache+graph"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DTYPES: tuple[DType, ...] = get_args(DType)
# What an arm computes in: `int8` are engines with 8-bit layers, the others in the fastest dtype of the device.
Precision = DType | Literal["int8"]
PRECISIONS: tuple[Precision, ...] = (*DTYPES, "int8")
PROMPT = "a large red circle at the left and a small blue square at the right on a white background"
TORCH = "torch"
AUTO = "auto"
GRAMMAR = "KIND[:BACKEND][:DTYPE]"
_CACHING: tuple[Kind, ...] = ("deepcache", "engine+cache", "engine+cache+graph")


@dataclass(frozen=True)
class Arm:
    """One way to run the denoising loop; `name` is what flags and results call it.

    `cache_interval` N stores the feature at every Nth U-Net call and reuses it at the others; 1 is no caching. Where
    `plan` names a plan's file, it says instead how many steps there are and which of them cache.
    """

    name: str
    kind: Kind
    backend: str
    dtype: Precision
    cache_interval: int
    branch_id: int
    plan: str = ""

    @property
    def is_engine(self) -> bool:
        return self.kind.startswith("engine")

    @property
    def is_cached(self) -> bool:
        return self.kind in _CACHING

    @property
    def is_graph(self) -> bool:
        """Whether the loop is one CUDA graph, in which no U-Net call has times of its own."""
        return self.kind.endswith("+graph")

    @property
    def prepares(self) -> bool:
        """Whether the first run compiles or records, and so must not be timed."""
        return self.kind == "compile" or self.is_graph

    @property
    def bundle_key(self) -> tuple[str, Precision, int]:
        """What an engine arm's bundle is built for, beside the settings: backend, dtype and branch."""
        return self.backend, self.dtype, self.branch_id

    @property
    def meaning(self) -> tuple[Kind, str, Precision, int, int, str]:
        """All but the name: two arms of one meaning run the same thing."""
        return self.kind, self.backend, self.dtype, self.cache_interval, self.branch_id, self.plan


@dataclass(frozen=True)
class Defaults:
    """What an arm's name leaves out: an engine arm's backend and dtype, and for all arms the caching."""

    backend: str = AUTO
    dtype: Precision = "fp32"
    cache_interval: int = 3
    branch_id: int = 0


@dataclass(frozen=True)
class BenchSettings:
    """What every arm runs: the same model, size, steps and inputs. Sizes in pixels.

    `guided_rows` is how many rows of the U-Net an image takes: as many as guidance has parts, 1 without guidance.
    `controlnets` are the folders of those that steer it, all by one drawn picture.
    """

    model: str
    random_weights: bool
    device: str
    cache_interval: int
    branch_id: int
    steps: int
    height: int
    width: int
    batch: int
    sampler: str
    dtype: Precision
    warmup: int
    repeats: int
    threads: int
    guided_rows: int = 2
    controlnets: tuple[str, ...] = ()
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5

    @property
    def guided(self) -> bool:
        return self.guided_rows > 1


def parse_dtype(name: str, where: str = "") -> DType:
    """A dtype by its name. Raises: `ValueError` naming those there are."""
    return cast("DType", one_of(f"a dtype{where}", name, DTYPES))


def parse_precision(name: str, where: str = "") -> Precision:
    """What an engine arm computes in, by its name. Raises: `ValueError` naming what there is."""
    return cast("Precision", one_of(f"a dtype{where}", name, PRECISIONS))


def parse_arm(name: str, defaults: Defaults) -> Arm:
    """An arm from its name. Torch arms take a dtype (fp32 without one), engine arms a backend, a dtype, or both.

    A backend may be left empty: `engine::bf16`.

    Raises: `ValueError` naming the part that is unknown and what was expected.
    """
    head, *parts = name.split(":")
    kind = cast("Kind", one_of(f"KIND of an arm {GRAMMAR}", head, KINDS))
    backend, dtype = (defaults.backend, defaults.dtype) if kind.startswith("engine") else (TORCH, "fp32")
    if parts and parts[0] == "":  # eager::bf16
        parts.pop(0)
    elif kind.startswith("engine") and parts and parts[0] not in PRECISIONS:
        backend = one_of(f"a backend in arm {name!r}", parts.pop(0), (AUTO, *BACKENDS))
    if parts:
        parse = parse_precision if kind.startswith("engine") else parse_dtype
        dtype = parse(parts.pop(0), f" in arm {name!r}")
    if parts:
        raise ValueError(f"expected an arm {GRAMMAR}, got {name!r}, which has {parts[0]!r} left over")
    interval = defaults.cache_interval if kind in _CACHING else 1
    return Arm(name, kind, backend, dtype, interval, defaults.branch_id)


def cached_arm(name: str, dtype: Precision, cache_interval: int, branch_id: int) -> Arm:
    """An arm with its own caching, which its name says too: for benchmarks of several kinds of it.

    Raises: as `parse_arm`.
    """
    arm = parse_arm(name, Defaults(dtype=dtype))
    told = f"{name} I={cache_interval} B={branch_id}" if cache_interval > 1 else name
    return replace(arm, name=told, cache_interval=cache_interval, branch_id=branch_id)


def parse_arms(names: str, defaults: Defaults) -> tuple[Arm, ...]:
    """Arms from their names with commas between, in that order, each once.

    Raises: `ValueError` for a name that is none.
    """
    return tuple(parse_arm(name, defaults) for name in dict.fromkeys(name.strip() for name in names.split(",")))
