"""What a step of a GPU's check is told: one value, which goes to the step's own process as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastcache.bench.arms import BenchSettings, cached_arm
from fastcache.bench.lineup import Lineup, line_up_arms
from fastcache_engines import DType

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Task:
    """What a step does, by its `kind`: `tests` of some files, or a model's `bench`, say.

    `arms` are names, each with cache interval and branch. `keeps` is whether bundles stay in the cache folder for the
    next step. `tests` are files; of these those whose names match `chosen`, as pytest's -k has it. `variables` go into
    the process's environment.
    """

    kind: str
    model: str = ""
    size: int = 0
    batch: int = 1
    steps: int = 50
    repeats: int = 3
    dtype: DType = "fp16"
    device: str = "cuda"
    arms: tuple[tuple[str, int, int], ...] = ()
    keeps: bool = True
    backend: str = "inductor"
    tests: tuple[str, ...] = ()
    chosen: str = ""
    variables: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Task:
        listed = {name: tuple(map(tuple, values[name])) for name in ("arms", "variables")}
        return cls(**values | listed | {"tests": tuple(values["tests"])})

    @property
    def settings(self) -> BenchSettings:
        """A preset has random weights, of which times are the model's own; a folder has its own."""
        return BenchSettings(
            model=self.model,
            random_weights=self.model != "demo" and not Path(self.model).is_dir(),
            device=self.device,
            cache_interval=3,
            branch_id=0,
            steps=self.steps,
            height=self.size,
            width=self.size,
            batch=self.batch,
            sampler="ddim",
            dtype=self.dtype,
            warmup=1,
            repeats=self.repeats,
            threads=torch.get_num_threads(),
        )

    @property
    def lineup(self) -> Lineup:
        arms = [cached_arm(name, self.dtype, interval, branch_id) for name, interval, branch_id in self.arms]
        return line_up_arms(arms, self.device)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
